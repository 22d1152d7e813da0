"""An environment that raises ends the run, or its row alone with a penalty."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from chatty import ASK, chatty, likely
from parrot import Build, Parrot, draw, talk

import stepwell as sw
from stepwell import check
from stepwell.errors import InputError
from stepwell.process.conversation.build import conversation


class Parses(Parrot):
    """Fails at every message with an a in it, as a parser of tool calls does."""

    def step(self, message: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if "a" in message:
            raise json.JSONDecodeError("no JSON", message, 0)
        return super().step(message)


class NoStart(Parrot):
    """Cannot be reset for one of the prompts."""

    def reset(self, prompt: Any) -> str | None:
        if prompt == "e" or prompt == ASK:
            raise OSError("the server is gone")
        return super().reset(prompt)


ENDS: dict[str, Any] = {"environment_errors": "end", "environment_penalty": -2.0}


@pytest.mark.filterwarnings("ignore:The environment")
def test_a_failing_step_ends_its_row_with_the_penalty(small_language: Build) -> None:
    drawn = draw(talk(small_language, make=Parses, **ENDS), 8)
    failed = 0
    for row, turns in enumerate(drawn.samples.columns["turns"]):
        error = drawn.samples.columns["environment_error"][row]
        assert all("a" not in turn["message"] and "error" not in turn for turn in turns[:-1])
        assert (error is not None) == bool(turns and "a" in turns[-1]["message"])
        if error is None:
            continue
        failed += 1
        assert turns[-1] == {"message": turns[-1]["message"], "observation": "", "reward": -2.0, "error": error}
        assert "The environment Parses raised JSONDecodeError (no JSON: line 1" in error
        assert not drawn.trajectories.truncated[row]
        length = int(drawn.trajectories.length[row])
        assert float(drawn.trajectories.step_reward[row, length - 1]) == -2.0
        assert drawn.samples.columns["environment_return"][row] == sum(turn["reward"] for turn in turns)
    assert 0 < failed < len(drawn)


@pytest.mark.filterwarnings("ignore:The environment")
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_failing_reset_ends_its_row_before_a_word(small_language: Build, chat: bool) -> None:
    process: Any = talk(small_language, make=NoStart, **ENDS)
    prompts: list[Any] = ["a b c d", "e"]
    if chat:
        process, prompts = conversation(chatty("chatml"), NoStart, **ENDS), [[{"role": "user", "content": "x"}], ASK]
    drawn = draw(process, 3, prompts)
    assert drawn.trajectories.length[3:].tolist() == [0, 0, 0]
    assert bool((drawn.trajectories.length[:3] > 0).all())
    assert drawn.samples.columns["environment_return"][3:] == [-2.0] * 3
    assert all(
        "OSError (the server is gone) in reset" in text for text in drawn.samples.columns["environment_error"][3:]
    )
    assert drawn.samples.columns["environment_error"][:3] == [None] * 3
    assert not drawn.trajectories.truncated[3:].any()
    assert drawn.samples.values[3:] == [[{"role": "assistant", "content": ""}] if chat else ""] * 3
    assert draw(process, 2, prompts[1:]).trajectories.length.tolist() == [0, 0]  # no row has a step


@pytest.mark.filterwarnings("ignore:The environment")
@pytest.mark.parametrize(
    "method", ["grpo", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr-grpo", "gspo", "rloo"))]
)
def test_runs_go_on_over_failures(small_language: Build, method: str, tmp_path: Path) -> None:
    class Both(Parses, NoStart):
        pass

    process = talk(small_language, make=Both, max_new_tokens=12, **ENDS)
    settings = {"steps": 2, "group_size": 4, "prompts_per_step": 2, "learning_rate": 1e-3, "progress": False}
    run = sw.train(process, ["e", "a b c d", "b"], sw.environment_return, method, out=tmp_path, **settings)
    assert run.steps == 2
    assert all(bool(p.isfinite().all()) for p in run.process.module.parameters())
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(value == value for line in metrics for value in line.values() if isinstance(value, float))


def test_a_failure_is_said_once(small_language: Build) -> None:
    with pytest.warns(UserWarning, match=r"raised JSONDecodeError .* ends here with the penalty -2, as do") as said:
        draw(talk(small_language, make=Parses, **ENDS), 8)
    assert len(said) == 1
    assert str(said[0].message).endswith("the column environment_error has their errors.")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The environment")
def test_the_laws_hold_with_rows_that_fail(small_language: Build) -> None:
    report = check.process(talk(small_language, "gpt2", make=Parses, max_new_tokens=12, **ENDS), ["a b c d", "f g"])
    assert set(report.skipped) == {"exact law"}


def test_by_default_a_failure_ends_the_run(small_language: Build) -> None:
    with pytest.raises(InputError, match="raised OSError"):
        draw(talk(small_language, make=NoStart))


def test_an_answer_of_another_shape_is_a_mistake_in_any_case(small_language: Build) -> None:
    class Three(Parrot):
        def step(self, message: str) -> Any:
            return "", 0.0, True

    with pytest.raises(InputError, match=r"must return \(observation, reward"):
        draw(talk(small_language, make=Three, **ENDS))


@pytest.mark.filterwarnings("ignore:The environment")
@pytest.mark.parametrize("raised", [SystemExit(3), GeneratorExit(), RecursionError()])
def test_whatever_is_raised_ends_the_row_alone(small_language: Build, raised: BaseException) -> None:
    class Raises(Parrot):
        def step(self, message: str) -> Any:
            raise raised

    drawn = draw(talk(small_language, make=Raises, **ENDS))
    assert any(error is not None for error in drawn.samples.columns["environment_error"])


def test_an_environment_leaves_torch_as_it_was(small_language: Build) -> None:
    import os

    import torch

    class Moves(Parrot):
        def step(self, message: str) -> Any:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float64)
            os.chdir("/")
            return super().step(message)

    here = os.getcwd()
    with torch.no_grad(), warnings.catch_warnings():
        drawn = draw(talk(small_language, make=Moves), 1)
        assert not torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert os.getcwd() == here
    assert drawn.samples.values == draw(talk(small_language), 1).samples.values


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_turn_tokens": 0}, "max_turn_tokens must be a whole number, at least 1, or None, got 0"),
        ({"max_turn_tokens": True}, "max_turn_tokens must be a whole number, at least 1, or None, got True"),
        ({"environment_errors": "ignore"}, "environment_errors must be one of end, raise; got 'ignore'"),
        ({"environment_penalty": float("nan")}, "environment_penalty must be a finite number, got nan"),
        ({"environment_penalty": "1"}, "environment_penalty must be a finite number, got '1'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    process = chatty("chatml")
    likely(process, "a")
    with pytest.raises(InputError, match=said):
        conversation(process, Parrot, **settings)
