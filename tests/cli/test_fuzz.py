"""Whatever is handed to a command ends with exit code 0 or with one sentence and 2: a seeded draw of bad input."""

from __future__ import annotations

import json
import os
import random
import warnings

import pytest
from command_bench import ROWS

from stepwell.cli import COMMANDS, main
from stepwell.cli.arguments import argument_names

LONG = "n" * 300
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "1.5",
    "true",
    "None",
    "[]",
    "{}",
    "a=b",
    "=",
    ":",
    "a:b",
]
TEXTS += [
    "é",
    "\x1b[2J",
    "\u202e",
    "a,b",
    ",",
    "9" * 400,
    "(" * 50,
    "[" * 5000,
    "1" + "e" * 300,
    "{'a': 1}",
    "2M-tokens",
]
PATHS = [
    "~nobody/x",
    "~",
    "/",
    ".",
    "..",
    "/dev/null",
    "/dev/full",
    "/dev/stdin",
    "pipe",
    "folder",
    "file.txt",
    "data.jsonl",
]
PATHS += [
    LONG,
    f"{LONG}/{LONG}",
    "a/" * 2000,
    "missing/deep/er",
    "data.jsonl/x",
    "deep.json",
    "deep.jsonl",
    "odd.parquet",
]
PATHS += [
    "nul.csv",
    "wide.csv",
    "twice.json",
    "utf16.jsonl",
    "loop",
    "empty.jsonl",
    "bad.py:f",
    "rewards.py:nothing",
    "locked",
]
PATHS += ["rewards.py:reward", "rewards.py:", ":reward", "os:system", "os.path", "broken.json", "set"]
VALUES = [*TEXTS, *PATHS]
PATTERNS = ["regular_expression:(", "regular_expression:a{99999999999}", "regular_expression:" + "(" * 500 + ")" * 500]


@pytest.fixture
def littered(bench):
    """A folder full of files that are not what their names say."""
    folder = bench.folder
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    (folder / "locked").mkdir(mode=0)
    (folder / "set").mkdir()
    (folder / "set" / "state.json").write_text("[")
    (folder / "set" / "dataset_info.json").write_text("{}")
    contents = {
        "file.txt": b"text",
        "deep.json": b"[" * 100_000,
        "deep.jsonl": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "odd.parquet": b"PAR1 nothing PAR1",
        "nul.csv": b"prompt,answer\na\0,b\n",
        "wide.csv": b"prompt,answer\n" + b"a" * 300_000 + b",b\n",
        "twice.json": b'[{"prompt": "a", "prompt": "b"}]',
        "utf16.jsonl": json.dumps(ROWS[0]).encode("utf-16"),
        "empty.jsonl": b"",
        "broken.json": b'{"version": 1, "entries": 5}',
        "bad.py": b"1 / 0\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    yield bench
    (folder / "locked").chmod(0o700)


def arguments_of(command):
    return [f"--{name.replace('_', '-')}" for name in argument_names(COMMANDS[command]) if name != "traceback"]


def commands(draw, bench):
    """A command that is right but for one or two of its arguments, at random."""
    kind = draw.choice(["train", "train", "train", "sample", "report", "lists", "compare"])
    if kind == "lists":
        name = draw.choice(["methods", "solvers", "tasks", "check", "compare", "report", "nothing"])
        return [name, *draw.choices(VALUES, k=draw.randint(name == "check", 2))]
    if kind == "report":
        return [
            "report",
            *draw.choices([*PATHS, "odd-run"], k=draw.randint(1, 2)),
            "--out",
            draw.choice([*PATHS[5:], "page.html"]),
        ]
    words = {
        "train": bench.words("--steps", "1"),
        "sample": [
            "sample",
            "--model",
            "flow.py:velocity",
            "--shape",
            "2",
            "--samples",
            "1",
            "--steps",
            "2",
            "--out",
            "drawn",
        ],
        "compare": [
            "compare",
            draw.choice(["nothing", "mixture"]),
            "--methods",
            "grpo",
            "--budget",
            "1-steps",
            "--seeds",
            "1",
        ],
    }[kind]
    for _ in range(draw.randint(1, 2)):
        argument = draw.choice(arguments_of(kind))
        pool = PATTERNS + VALUES if argument == "--reward" else VALUES
        words += [argument, *draw.choices(pool, k=draw.choice([1, 1, 1, 0, 2]))]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_bad_input_of_every_kind_ends_in_one_sentence(littered, capsys, seed):
    draw = random.Random(seed)
    (littered.folder / "flow.py").write_text("def velocity(x, t):\n    return x / t\n")
    (littered.folder / "odd-run").mkdir()
    odd = ['{"step": 1, "reward": {"a": []}}', '{"step": "x", "reward": 1e999}', "[]", "5", "null"]
    (littered.folder / "odd-run" / "metrics.jsonl").write_text("".join(line + "\n" for line in odd))
    (littered.folder / "odd-run" / "run.json").write_text(
        draw.choice(["[]", "5", '{"card": 3, "method": []}', "[" * 100_000])
    )
    failures = []
    for number in range(80):
        words = [word for word in commands(draw, littered) if "\0" not in word]
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(words)
        said = capsys.readouterr().err
        sentences = [line for line in said.splitlines() if line.startswith("stepwell: ")]
        right = (code == 0 and not sentences) or (code == 2 and len(sentences) == 1)
        if not right or "Traceback" in said:
            failures.append((number, code, [word[:60] for word in words], said[-400:]))
    assert not failures, "\n".join(map(str, failures))
