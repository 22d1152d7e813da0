"""A reward that misbehaves ends a run in one sentence, or changes nothing of it; the work so far is kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import stepwell as sw
from stepwell import guarded
from stepwell.errors import InputError, RewardError
from stepwell.guarded import Guarded, OutOfTime, reason_of
from stepwell.reward import verifiers
from stepwell.training import checkpoint


def train(reward, out=None, steps=3, **options):
    model = sw.exact.markov(symbols=3, length=3, prompts=4)
    rows = [{"prompt": number, "answer": [number, {"deep": [number]}]} for number in range(4)]
    given = {"prompts_per_step": 2, "group_size": 4, "learning_rate": 0.1}
    return sw.train(model, rows, reward, "grpo", steps=steps, out=out, **given, **options)


def count(completions):
    return [float(sum(symbol == 1 for symbol in text)) for text in completions]


@pytest.fixture(scope="module")
def plain():
    return train(lambda completions, **columns: count(completions)).process.logits.detach()


def no_gradients():
    torch.set_grad_enabled(False)


def left_open():
    torch.no_grad().__enter__()
    left_open.mode = torch.inference_mode()
    left_open.mode.__enter__()


def double_precision():
    torch.set_default_dtype(torch.float64)


def other_device():
    torch.set_default_device("meta")


def threads():
    torch.set_num_threads(3)


def deterministic():
    torch.use_deterministic_algorithms(True)


def autocast():
    torch.set_autocast_enabled("cpu", True)


def elsewhere():
    os.chdir("/")


def generators():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def deaf():
    for number in guarded.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def strict():
    warnings.simplefilter("error")


def masked():
    os.umask(0o777)


def no_output():
    sys.stdout = None
    print("to nobody")


def own_alarm():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(0)


def forked():
    if os.fork() == 0:
        time.sleep(0.01)  # and returns into the run


CHANGES = [no_gradients, left_open, double_precision, other_device, threads, deterministic, autocast, elsewhere]
CHANGES += [generators, deaf, strict, masked, no_output, own_alarm, forked]


def around():
    """The state of torch and the interpreter."""
    mask = os.umask(0o22)
    os.umask(mask)
    return {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
        "mask": mask,
        "handlers": [signal.getsignal(number) for number in guarded.SIGNALS],
        "filters": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_reward_changes_around_itself_changes_no_number_of_the_run(change, plain, tmp_path):
    before = around()
    torch.set_default_device(None)  # imports what it needs, which takes longer than the time limit

    def reward(completions, **columns):
        change()
        return count(completions)

    run = train(sw.Rewards(reward, timeout=60.0), out=tmp_path / "run")
    assert around() == before
    assert torch.equal(run.process.logits, plain)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mode & 0o400


def test_what_a_reward_does_to_its_arguments_stays_with_it(plain):
    def reward(completions, prompts, completion_ids, answer):
        rewards = count(completions)
        for ids in completion_ids:
            ids[:] = [0] * len(ids)
        for entry in answer:
            assert entry[1]["deep"] == [entry[0]]
            entry[1]["deep"].append("more")
            entry[1] = None
            entry.clear()
        completions.clear()
        prompts.clear()
        return rewards

    def after(completions, answer):
        assert all(entry[1]["deep"] == [entry[0]] for entry in answer)
        return [0.0] * len(completions)

    assert torch.equal(train([reward, after]).process.logits, plain)


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class OwnInterrupt(KeyboardInterrupt):
    pass


ENDS = [SystemExit(3), GeneratorExit("x"), BaseException("boo"), OwnInterrupt("stop"), KeyboardInterrupt()]
ENDS += [asyncio.CancelledError(), Speechless(), MemoryError(), StopIteration(4), ValueError("a\nb \x1b[31m red")]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_any_exception_is_one_sentence_and_keeps_the_work(error, asynchronous, tmp_path):
    if asynchronous and isinstance(error, SystemExit | KeyboardInterrupt | StopIteration):
        pytest.skip("asyncio hands these to whoever runs the loop")
    calls = 0

    def raising(completions):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return count(completions)

    async def later(completions, **columns):
        return raising(completions)

    with pytest.raises(RewardError) as refused:
        train(later if asynchronous else lambda completions, **columns: raising(completions), out=tmp_path / "run")
    said = str(refused.value)
    assert f"raised {type(error).__name__}" in said
    assert said.isprintable()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "update-00000002"
    again = train(lambda completions, **columns: count(completions))
    assert again.steps == 3


def test_recursion_without_end_is_one_sentence():
    def endless(completions, **columns):
        return endless(completions)

    with pytest.raises(RewardError, match="raised RecursionError"):
        train(endless)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e308, "must return a number of at most 1e+15"),
        (-1e39, "must return a number of at most 1e+15"),
        (10**400, "must return a finite number"),
        (float("nan"), "must return a finite number"),
        (np.float32("inf"), "must return a finite number"),
        (1j, "must return a number, or None"),
        ("1.0", "must return a number, or None"),
        (torch.zeros(2), "must return a number, or None"),
    ],
)
def test_a_number_with_which_sums_overflow_is_refused(value, said):
    with pytest.raises(RewardError, match=re.escape(said)):
        train(lambda completions, **columns: [0.0] * (len(completions) - 1) + [value])


def test_a_weighted_sum_that_overflows_is_refused():
    with pytest.raises(RewardError, match="The weighted sum of rewards must be at most 1e\\+15"):
        train(sw.Rewards(lambda completions, **columns: [1e15] * len(completions), weights=[1e300]))


@pytest.mark.parametrize("kind", [np.float16, np.int64, np.bool_, Decimal, Fraction, torch.tensor, bool, int])
def test_numbers_of_every_kind_are_numbers(kind, plain):
    run = train(lambda completions, **columns: [kind(int(value)) for value in count(completions)])
    whole = train(lambda completions, **columns: [float(kind(int(value))) for value in count(completions)])
    assert torch.equal(run.process.logits, whole.process.logits)


# time


@pytest.fixture(autouse=True)
def nothing_watches_on():
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(each.name == "stepwell-limit" for each in threading.enumerate()):
        time.sleep(0.01)
    assert [each for each in threading.enumerate() if each.name == "stepwell-limit"] == []
    assert guarded._Limit.running == []


def loops():
    while True:
        pass


def sleeps():
    time.sleep(1000)


def matches():
    re.match(r"(a+)+$", "a" * 40 + "b")


def waits():
    threading.Event().wait(1000)


def swallows():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(1000)


def alarmed():
    signal.alarm(0)  # as math-verify does after its own timeout
    loops()


@pytest.mark.parametrize("hang", [loops, sleeps, matches, waits, swallows, alarmed], ids=lambda hang: hang.__name__)
def test_a_reward_that_hangs_ends_at_its_timeout(hang, tmp_path):
    calls = 0

    def reward(completions, **columns):
        nonlocal calls
        calls += 1
        if calls == 3:
            hang()
        return count(completions)

    begin = time.monotonic()
    with pytest.raises(
        RewardError, match=r"Reward 'reward' took longer than 0\.2 seconds, its timeout, at test_misbehav"
    ):
        train(sw.Rewards(reward, timeout=0.2), out=tmp_path / "run")
    assert time.monotonic() - begin < 60.0
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "update-00000002"
    time.sleep(0.3)  # nothing rings afterwards


@pytest.mark.parametrize("blocking", [False, True])
def test_coroutines_that_hang_end_at_the_timeout(blocking):
    release = threading.Event()

    async def slow(completions, **columns):
        if blocking:
            release.wait(30)
        await asyncio.sleep(1000)

    try:
        with pytest.raises(RewardError, match=r"Reward 'slow' took longer than 0\.2 seconds"):
            train(sw.Rewards(slow, timeout=0.2))
    finally:
        release.set()

    async def quick(completions, **columns):
        return count(completions)

    assert train(quick).steps == 3


def test_a_reward_hangs_no_longer_in_another_thread():
    """Without the main thread's signals, Python code ends all the same."""
    said = []

    def run():
        try:
            train(sw.Rewards(lambda completions, **columns: loops(), timeout=0.2))
        except RewardError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert "took longer than 0.2 seconds" in said[0]


def test_a_limit_inside_another_ends_only_its_own_code():
    def refusal(name):
        return lambda error: RewardError(f"{name} {type(error).__name__}")

    for outer, inner, over in ((0.2, 60.0, "outer"), (60.0, 0.05, "inner")):
        said = pytest.raises(RewardError, match=f"{over} OutOfTime")
        with said, Guarded(refusal("outer"), outer), Guarded(refusal("inner"), inner):
            loops()


def test_time_that_is_up_as_the_code_ends_never_slips_out():
    for length in range(2000):
        try:
            with Guarded(lambda error: RewardError("late"), 1e-4):
                for _ in range(length % 200):
                    pass
        except RewardError:
            pass
    time.sleep(0.3)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_timeout_that_is_none_is_refused(timeout):
    with pytest.raises(InputError, match=r"Rewards\.timeout must be a finite number of seconds above 0, or None"):
        sw.Rewards(count, timeout=timeout)


def test_a_catastrophic_pattern_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(verifiers, "MATCHING", 0.2)
    judge = verifiers.regular_expression(r"(a+)+$")
    assert judge(completions=["aaa"], answer=["aaa"]) == [1.0]
    with pytest.raises(RewardError, match=re.escape("'(a+)+$', without repetitions inside of repetitions.")):
        judge(completions=["aaa", "a" * 60 + "b"], answer=["aaa", "a"])


def test_the_message_of_an_exception_never_raises():
    assert reason_of(Speechless()) == ""
    assert reason_of(ValueError("a\x1b[2J\n  b.")) == "a [2J b"
    assert OutOfTime.__mro__[1] is BaseException
