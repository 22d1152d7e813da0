"""The terminal is not the run: a run ends with its model and its exit code, whether anybody looks or not."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import textwrap
import threading
import time

import pytest

from stepwell.cli import LAST_WORDS, main
from stepwell.terminal import Screen, on_screen, one_line, printable
from stepwell.training.log import read_lines

WRAPPER = textwrap.dedent(
    """
    import os, sys
    kind, *words = sys.argv[1:]
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif kind == "all-full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(1, 2)
    elif kind == "closed":
        os.close(1)
        sys.stdout = None
    elif kind == "head":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    elif kind == "ascii":
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
    elif kind == "lost":
        sys.stdout.close()
    elif kind.startswith("/dev/"):
        os.setsid()
        terminal = os.open(kind, os.O_RDWR)
        os.dup2(terminal, 1)
    sys.argv = ["stepwell", *words]
    from stepwell.cli import main
    sys.exit(main())
    """
)


@pytest.fixture
def behind(bench, start):
    """`behind("full", *words)`: a command behind such a standard output."""
    (bench.folder / "behind.py").write_text(WRAPPER)

    def run(kind, *words):
        return start("behind.py", kind, *words)

    return run


KINDS = ["full", "all-full", "closed", "head", "ascii", "lost"]


@pytest.mark.parametrize("kind", [*KINDS[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_run_ends_with_its_model_whatever_becomes_of_the_output(bench, behind, kind):
    bench.write("data.jsonl", json.dumps({"prompt": "é b", "answer": "a"}), json.dumps({"prompt": "c", "answer": "b"}))
    words = [word for word in bench.words("--steps", "3") if word != "--no-progress"]
    program = behind(kind, *words).wait()
    assert program.returncode == 0, program.stderr
    assert len(read_lines(bench.out / "metrics.jsonl")) == 3
    assert (bench.out / "model.safetensors").exists()
    bench.whole()
    for unwanted in ("Traceback", "Exception ignored", "Error"):
        assert unwanted not in program.stderr
    if kind != "ascii":
        last = (bench.out / LAST_WORDS).read_text()
        assert "3 steps of grpo" in last
        assert "The trained model and the log are in " in last
    if kind in ("full", "closed", "head", "lost"):
        assert "3 steps of grpo" in program.stderr


def test_the_words_of_an_error_go_to_the_log_where_nobody_hears_them(bench, behind):
    program = behind("all-full", *bench.words("--reward", "rewards.py:raises_later", "--steps", "4")).wait()
    assert program.returncode == 2
    assert "'raises_later' raised RuntimeError" in (bench.out / LAST_WORDS).read_text()
    assert program.stderr == ""


def test_a_terminal_that_goes_away_does_not_end_the_run(bench, behind):
    """Without a signal: the terminal is another's than the session's."""
    master, slave = pty.openpty()
    fcntl.fcntl(master, fcntl.F_SETFL, os.O_NONBLOCK)
    bench.write(
        "slow.py",
        "import time",
        "def reward(completions, **c):",
        "    time.sleep(0.02)",
        "    return [1.0] * len(completions)",
    )
    words = [word for word in bench.words("--steps", "40", "--reward", "slow.py:reward") if word != "--no-progress"]
    program = behind(os.ttyname(slave), *words)
    done = threading.Event()

    def drain():
        while not done.wait(0.01):
            try:
                os.read(master, 65536)
            except BlockingIOError:
                pass
            except OSError:
                return

    reader = threading.Thread(target=drain)
    reader.start()
    _wait_for(bench.out / "metrics.jsonl", 3)
    os.close(slave)
    done.set()
    reader.join()
    os.close(master)
    program.wait()
    if program.returncode == 130:  # the session's own terminal: the kernel sends SIGHUP
        assert list(bench.out.glob("checkpoints/update-*"))
    else:
        assert program.returncode == 0, program.stderr
        assert len(read_lines(bench.out / "metrics.jsonl")) == 40


def _wait_for(file, lines):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.02)


SLEEPS = [
    "import time",
    "def reward(completions, **c):",
    "    time.sleep(0.05)",
    "    return [float(len(c)) for c in completions]",
]


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        pytest.param([signal.SIGHUP], 130, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], 130, marks=pytest.mark.slow),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 130),
    ],
    ids=["hang-up", "terminate", "several"],
)
def test_a_signal_stops_between_two_updates_with_a_checkpoint(bench, start, signals, code):
    bench.write("slow.py", *SLEEPS)
    program = start("stepwell", *bench.words("--steps", "500", "--reward", "slow.py:reward"))
    _wait_for(bench.out / "metrics.jsonl", 2)
    for number in signals:
        os.kill(program.process.pid, number)
    assert program.wait().returncode == code
    said = "the same command with --resume continues from there, and `stepwell export` writes its model"
    assert program.stderr == f"stepwell: interrupted; {said}.\n"
    steps = len(read_lines(bench.out / "metrics.jsonl"))
    assert (bench.out / "checkpoints" / f"update-{steps:08d}").is_dir()
    assert not (bench.out / "model.safetensors").exists()


IGNORES = textwrap.dedent(
    """
    import signal, sys
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from stepwell.cli import main
    sys.exit(main())
    """
)


@pytest.mark.slow
def test_a_run_behind_nohup_goes_on(bench, start):
    bench.write("slow.py", *SLEEPS)
    (bench.folder / "nohup.py").write_text(IGNORES)
    program = start("nohup.py", *bench.words("--steps", "6", "--reward", "slow.py:reward"))
    _wait_for(bench.out / "metrics.jsonl", 1)
    os.kill(program.process.pid, signal.SIGHUP)
    assert program.wait().returncode == 0
    assert len(read_lines(bench.out / "metrics.jsonl")) == 6


PRINTING = [
    ("methods",),
    ("methods", "grpo"),
    ("methods", "--json"),
    ("solvers",),
    ("tasks",),
    ("--version",),
    ("--help",),
]
PRINTING = [PRINTING[0], *(pytest.param(words, marks=pytest.mark.slow) for words in PRINTING[1:])]


@pytest.mark.parametrize("words", PRINTING)
@pytest.mark.parametrize(
    ("kind", "code", "said"), [("full", 2, "The output cannot be written"), ("closed", 0, ""), ("head", 0, "")]
)
def test_what_only_prints_fails_where_it_cannot_and_is_silent_where_nobody_reads(behind, words, kind, code, said):
    program = behind(kind, *words).wait()
    assert program.returncode == code
    assert said in program.stderr
    assert program.stderr.count("\n") == bool(said)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("full", 2), ("closed", 0), ("head", 0)])
def test_a_check_has_its_own_exit_code(behind, kind, code):
    assert behind(kind, "check", "reinforce").wait().returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "closed", "head"])
def test_samples_and_reports_are_written_whatever_becomes_of_the_output(bench, behind, kind):
    (bench.folder / "flow.py").write_text("def velocity(x, t):\n    return x / t\n")
    drawn = behind(
        kind, "sample", "--model", "flow.py:velocity", "--shape", "2", "--out", "drawn", "--samples", "2"
    ).wait()
    assert drawn.returncode == 0, drawn.stderr
    assert (bench.folder / "drawn" / "samples.json").exists()
    assert "in drawn" in (bench.folder / "drawn" / LAST_WORDS).read_text()
    bench.out.mkdir()
    (bench.out / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    reported = behind(kind, "report", "run", "--out", "page.html").wait()
    assert reported.returncode == 0, reported.stderr
    assert (bench.folder / "page.html").exists()


# characters that steer


STEERING = "\x1b[2J\x1b]0;title\x07 \u202eback\u202c \x9b31m \x08\r"


def test_no_text_of_others_steers_the_terminal(bench, capsys, tmp_path, monkeypatch):
    """Prompts in errors, names of options, plugins' cards, and what is printed of a run."""
    capsys.readouterr()  # transformers shows how it writes the bench's model
    bench.write("data.jsonl", json.dumps({"prompt": f"a {STEERING}" * 80, "answer": "a"}))
    assert main(bench.words()) == 2
    bench.write("data.jsonl", json.dumps({"prompt": "a", "answer": STEERING}))
    bench.write("loud.py", "def reward(completions, answer, **c):", "    raise ValueError(answer[0] * 9)")
    assert main(bench.words("--reward", "loud.py:reward")) == 2
    assert main(["train", f"--{STEERING}"]) == 2
    assert main(["methods", STEERING]) == 2
    assert main(["methods", "--search", STEERING]) == 2
    assert main(bench.words("--out", f"run{STEERING}")) == 0
    assert main(["report", f"run{STEERING}", "--out", f"{STEERING}.html"]) == 0
    plugin = (
        "import stepwell as sw\nfrom stepwell.objective.policy import Policy\n"
        f"@sw.method('steered', title={STEERING!r}, when={STEERING!r}, differs={STEERING!r}, paper={STEERING!r})\n"
        f"def build(strength: str = {STEERING!r}):\n    return sw.Recipe(Policy())\n"
    )
    bench.write("plugin.py", plugin)
    from stepwell import methods

    try:
        assert main(["methods", "--plugin", "plugin.py"]) == 0
        assert main(["methods", "steered", "--plugin", "plugin.py"]) == 0
        assert main(["methods", "steered", "--plugin", "plugin.py", "--json"]) == 0
    finally:
        methods.forget("steered")
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []


def test_printable_texts_stay_as_they_are():
    text = "Grüße, 你好, α ≤ β, e\u0301, 👍\n\tnext"
    assert printable(text) == text
    assert one_line(text) == "Grüße, 你好, α ≤ β, e\u0301, 👍 next"


class Fails:
    encoding = "utf-8"

    def __init__(self, error):
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    flush = write


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "gone"), ValueError("closed")])
def test_a_screen_gives_up_at_the_first_failure(error):
    stream = Fails(error)
    screen = Screen(stream)
    assert screen.write("a") == 1
    assert screen.failure is error
    screen.write("b")
    screen.flush()
    assert stream.calls == 1
    assert not screen.isatty()


def test_what_is_left_for_a_reader_that_is_gone_goes_nowhere(monkeypatch):
    """Else Python would stumble over it as it closes the stream at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with on_screen() as (out, _):
            print("a")
            out.flush()
            assert isinstance(out.failure, BrokenPipeError)
        print("b", flush=True)


def test_an_unforeseen_error_is_one_sentence(monkeypatch, capsys):
    from stepwell.methods import catalogue

    def broken(name):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(catalogue, "get", broken)
    assert main(["methods", "grpo"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("stepwell: ZeroDivisionError (by zero) at test_terminal.py, line ")
    assert "a fault of Stepwell unless the code is your own" in shown
    assert "Traceback" not in shown
    assert main(["methods", "grpo", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err
