"""A run that was killed, wherever it was, ends with the very weights and metrics of one that never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

import stepwell as sw
from stepwell.errors import CheckpointError, InputError, RewardError
from stepwell.training import checkpoint

SEVERAL_EPOCHS = {"epochs": 2, "minibatches": 2}
METHODS = {
    "grpo": {},
    "grpo, several epochs": SEVERAL_EPOCHS,
    "dapo": SEVERAL_EPOCHS,
    "ppo": {},
    "dpo": {"epochs": 2},
}


def uneven(completions, **columns):
    return [float(len(text)) + 0.1 * text.count(2) for text in completions]


def tabular(method, out, *, resume=False, reward=uneven, seed=1, **settings):
    """A short run of a tabular model, with a checkpoint after every update."""
    model = sw.exact.markov(symbols=3, length=4, prompts=5, seed=3)
    given = {"steps": 3, "learning_rate": 0.1, "prompts_per_step": 4, "group_size": 3, "seed": seed}
    given |= {"checkpoint_every": 1, "keep": 1000, "schedule": "linear", "weight_decay": 0.01}
    prompts = [{"prompt": i} for i in range(5)]
    name = method.split(",")[0]
    return sw.train(model, prompts, reward, name, out=out, resume=resume, **{**given, **METHODS[method], **settings})


def weights(run):
    return [p.detach().clone() for p in run.process.module.parameters()]


def cut_back(whole: Path, copy: Path, name: str) -> None:
    """A copy of a run's folder as it was when checkpoint `name` was the newest."""
    shutil.copytree(whole, copy)
    for other in (copy / "checkpoints").iterdir():
        if other.name > name:
            shutil.rmtree(other)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if "," in name else name for name in METHODS]
)
def test_resuming_at_every_update_ends_bit_for_bit_alike(method, tmp_path):
    run = tabular(method, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    assert len(names) >= 3
    halves = 0
    for name in names[:-1]:
        cut_back(tmp_path / "whole", tmp_path / name, name)
        halves += (tmp_path / name / "checkpoints" / name / "rows.safetensors").exists()
        again = tabular(method, tmp_path / name, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True)), name
        for file in ("metrics.jsonl", "completions.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), name
    assert (halves > 0) == (run.recipe.epochs * run.recipe.minibatches > 1), "half-used batches were among them"


def test_a_resumed_run_that_forgets_its_place_in_the_data_is_noticed(tmp_path, monkeypatch):
    run = tabular("grpo", tmp_path / "whole")
    cut_back(tmp_path / "whole", tmp_path / "cut", "update-00000001")
    monkeypatch.setattr("stepwell.data.stream.PromptStream.load_state_dict", lambda self, state: None)
    again = tabular("grpo", tmp_path / "cut", resume=True)
    assert not torch.equal(weights(run)[0], weights(again)[0])


@pytest.mark.parametrize("method", [pytest.param("grpo", marks=pytest.mark.slow), "ppo"])
def test_a_transformer_resumes_bit_for_bit_in_the_middle_of_a_batch(method, tmp_path, small_language):
    def go(out, resume=False):
        reward = lambda completions, **columns: [float(text.count("a")) for text in completions]  # noqa: E731
        return sw.train(
            small_language(max_new_tokens=6, dtype="float32"),
            ["a b c", "d", "e f g h", "a"],
            reward,
            method,
            options={"kl": 0.05},
            out=out,
            resume=resume,
            steps=2,
            learning_rate=1e-3,
            prompts_per_step=2,
            group_size=4,
            epochs=2,
            minibatches=2,
            checkpoint_every=1,
            keep=1000,
        )

    run = go(tmp_path / "whole")
    for name in ("update-00000003", "update-00000004", "update-00000006"):
        cut_back(tmp_path / "whole", tmp_path / name, name)
        again = go(tmp_path / name, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_the_folder_of_a_run_loads_with_transformers(tmp_path, small_language):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    process = small_language(max_new_tokens=4)
    reward = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    sw.train(process, ["a", "b"], reward, "rloo", out=tmp_path / "run", steps=1, prompts_per_step=2, group_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    for own, loaded in zip(process.network.causal.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, loaded)


KILLED = textwrap.dedent(
    """
    import os, random, signal, sys, time
    import torch
    import stepwell as sw
    from stepwell.training import loop  # everything is imported before the first fork

    torch.set_num_threads(1)
    folder, method, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def uneven(completions, **columns):
        time.sleep(0.005)
        return [float(len(text)) + 0.1 * text.count(2) for text in completions]

    def go(out):
        model = sw.exact.markov(symbols=3, length=4, prompts=5, seed=3)
        more = {"epochs": 2, "minibatches": 2} if method != "ppo" else {}
        sw.train(model, [{"prompt": i} for i in range(5)], uneven, method, out=out,
                 resume=os.path.isdir(out + "/checkpoints") and any(
                     name.startswith("update-") for name in os.listdir(out + "/checkpoints")),
                 steps=8, learning_rate=0.1, prompts_per_step=4, group_size=3, checkpoint_every=1, keep=2, **more)
        torch.save([p.detach() for p in model.module.parameters()], out + "/weights")

    def child(out):
        pid = os.fork()
        if pid == 0:
            try:
                go(out)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        return pid

    def wait(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    begin = time.monotonic()
    assert wait(child(folder + "/whole")) == 0
    length = time.monotonic() - begin
    dice, kills = random.Random(seed), 0
    for attempt in range(60):
        pid = child(folder + "/killed")
        if attempt < 12:
            time.sleep(dice.uniform(0.0, length / 3))
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        if code != -signal.SIGKILL and not os.path.isdir(folder + "/killed/checkpoints"):
            raise SystemExit("a run failed by itself")
        if not os.path.isdir(folder + "/killed/checkpoints"):
            import shutil
            shutil.rmtree(folder + "/killed", ignore_errors=True)  # killed before its first checkpoint: start anew
        assert code in (0, -signal.SIGKILL), code
    print(kills)
    """
)


@pytest.mark.parametrize("method", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grpo", "dapo"))])
def test_runs_killed_at_random_moments_end_bit_for_bit_alike(method, start, tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    done = start("script.py", str(tmp_path), method, "5").wait()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3, "it has to have been killed a few times"
    whole, killed = (torch.load(tmp_path / name / "weights") for name in ("whole", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(whole, killed, strict=True))
    for file in ("metrics.jsonl", "completions.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert all(name.startswith("update-") for name in left), "nothing half-written stays"


def test_a_failing_reward_stops_with_a_checkpoint_that_resumes_alike(tmp_path):
    run = tabular("grpo", tmp_path / "whole")
    calls = []

    def fails_once(completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the judge is out")
        return uneven(completions)

    fails_once.__name__ = "uneven"
    with pytest.raises(RewardError, match=r"uneven.*the judge is out"):
        tabular("grpo", tmp_path / "out", reward=fails_once, checkpoint_every=0)
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").name == "update-00000001"
    again = tabular("grpo", tmp_path / "out", reward=fails_once, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))


def test_a_damaged_checkpoint_is_one_clear_sentence(tmp_path):
    tabular("grpo", tmp_path / "run", keep=1)
    file = checkpoint.newest(tmp_path / "run" / "checkpoints") / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"parameters.safetensors' is damaged: \d+ bytes"):
        tabular("grpo", tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "dapo"}, "is of another method"),
        ({"seed": 2}, "is of a run with seed=1, not 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, said, tmp_path):
    tabular("grpo", tmp_path / "run")
    method = change.pop("method", "grpo")
    with pytest.raises(CheckpointError, match=said):
        tabular(method, tmp_path / "run", resume=True, **change)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tabular("grpo", tmp_path / "run")
    model = sw.exact.markov(symbols=4, length=4, prompts=5)
    with pytest.raises(CheckpointError, match="is of another model"):
        sw.train(model, [{"prompt": i} for i in range(5)], uneven, "grpo", out=tmp_path / "run", resume=True, steps=3)


def test_a_checkpoint_of_a_method_with_a_critic_is_of_another_method(tmp_path):
    tabular("ppo", tmp_path / "run")
    with pytest.raises(CheckpointError, match="is of another method"):
        tabular("grpo", tmp_path / "run", resume=True)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    tabular("grpo", tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already; resume it"):
        tabular("grpo", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="There is no run to resume"):
        tabular("grpo", tmp_path / "nothing", resume=True)


def test_only_the_newest_checkpoints_stay(tmp_path):
    tabular("grpo", tmp_path / "run", keep=2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["update-00000002", "update-00000003"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("call", range(9))
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(call, tmp_path, monkeypatch):
    folder = tmp_path / "update-00000007"
    checkpoint.write(folder, {"at": "first"}, {})
    left = [call]

    def dies(function):
        def call_or_die(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*arguments, **options)

        return call_or_die

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", dies(os.replace))
        patched.setattr("shutil.rmtree", dies(shutil.rmtree))
        with contextlib.suppress(Killed):
            checkpoint.write(folder, {"at": "second"}, {})
    found = checkpoint.newest(tmp_path)
    assert found == folder
    assert checkpoint.read(found)[0]["at"] in ("first", "second")
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000007"], "nothing half-written stays"


def test_metrics_hold_nothing_that_the_seed_does_not_decide(tmp_path):
    for name in ("first", "second"):
        tabular("ppo", tmp_path / name)
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == (tmp_path / "second" / "metrics.jsonl").read_bytes()
    line = json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[0])
    assert not [name for name in line if "time" in name or "second" in name]


def test_a_failure_while_a_step_is_finished_resumes_alike(tmp_path):
    fails = []

    def judged(completions, **columns):
        if fails and len(completions) == 2:  # the evaluation's rows
            raise ValueError("the judge is out")
        return uneven(completions)

    def go(out, resume=False, method="ppo"):
        held_out = {"evaluation": [{"prompt": 0}], "evaluate_every": 2, "evaluation_samples": 2}
        return tabular(method, out, resume=resume, reward=judged, **held_out)

    run = go(tmp_path / "whole")
    fails.append(True)
    with pytest.raises(RewardError, match="the judge is out"):
        go(tmp_path / "cut")
    fails.clear()
    again = go(tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_a_budget_in_tokens_resumes_alike_in_the_middle_of_a_batch(every, tmp_path):
    given = {"steps": None, "budget": "2k-tokens", "schedule": "linear"}
    run = tabular("ppo", tmp_path / "whole", **given)
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    for name in names[:-1:every]:
        cut_back(tmp_path / "whole", tmp_path / name, name)
        again = tabular("ppo", tmp_path / name, resume=True, **given)
        assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True)), name
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_other_prompts_are_refused(tmp_path):
    tabular("grpo", tmp_path / "run")
    model = sw.exact.markov(symbols=3, length=4, prompts=5, seed=3)
    given = {"steps": 4, "learning_rate": 0.1, "prompts_per_step": 4, "group_size": 3, "seed": 1, "schedule": "linear"}
    with pytest.raises(CheckpointError, match="is of another data"):
        sw.train(model, [{"prompt": 0}] * 5, uneven, out=tmp_path / "run", resume=True, weight_decay=0.01, **given)
