"""Settings that are what their types say, and messages that name the setting, the right values and the wrong one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

import stepwell
from stepwell.errors import InputError, UnknownName
from stepwell.objective.ratio import Ratio
from stepwell.objective.state import Coefficient, Ramp
from stepwell.parts import Constant, Part
from stepwell.process.exact.table import markov
from stepwell.ranges import (
    Checked,
    Count,
    Demand,
    NotNegative,
    Portion,
    Positive,
    Range,
    Share,
    Size,
    Width,
    demands,
)
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request

INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (Share, (0, 0.5, 1), (-0.1, 1.1, NAN, "1", True, None)),
        (Portion, (0.1, 1), (0, 1.1, INFINITY)),
        (Positive, (1e-9, 3), (0, -1, INFINITY)),
        (NotNegative, (0, 3.5), (-1e-9, INFINITY)),
        (Width, (0, 2.0, INFINITY), (-1, NAN)),
        (Size, (1, 7), (0, 1.5, "3", False)),
        (Count, (0, 7), (-1, 0.5)),
        (Annotated[float, Range("a number from -1 to 1", -1, 1)], (-1, 0.0, 1), (-2, 2)),
    ],
)
def test_a_range_holds_its_numbers_and_no_other_values(kind, right, wrong):
    (limits,) = kind.__metadata__
    assert all(limits.holds(value) for value in right)
    assert not any(limits.holds(value) for value in wrong)


@dataclass(frozen=True)
class Settings(Checked):
    share: Share = 0.5
    moving: Share | Coefficient = 0.5
    bound: Positive | None = None
    plain: float = 1.0
    whole: int = 1
    mode: Literal["mean", "none", "std"] = "mean"
    either: Literal["old", "none"] | Part = "old"
    part: Part = Constant()  # noqa: RUF009
    maybe: Part | None = None
    ratio: Ratio = Ratio()  # noqa: RUF009
    text: str = "any"
    pair: tuple[float, float] | None = None


@pytest.mark.parametrize(
    "right",
    [
        {"moving": Ramp("share", 0.2)},
        {"bound": 3},
        {"either": Constant()},
        {"either": "none"},
        {"part": lambda batch: batch.reward},  # a function stands in for a part
        {"maybe": Constant()},
        {"text": 3},  # only numbers, choices and parts are checked
        {"pair": "any"},
    ],
)
def test_what_a_type_allows_is_taken(right):
    made = Settings(**right)
    assert all(getattr(made, name) is value for name, value in right.items())


WRONG = [
    ({"share": 2}, "Settings.share must be a number from 0 to 1, got 2."),
    ({"share": "0.5"}, "Settings.share must be a number from 0 to 1, got '0.5'."),
    ({"moving": 2}, "Settings.moving must be a number from 0 to 1, or a Coefficient, got 2."),
    (
        {"moving": Ramp("share", 2.0)},
        "Settings.moving must be a number from 0 to 1, or a Coefficient, got a Ramp that begins at 2.0.",
    ),
    ({"bound": 0}, "Settings.bound must be a finite number above 0, or None, got 0."),
    ({"plain": INFINITY}, "Settings.plain must be a finite number, got inf."),
    ({"plain": None}, "Settings.plain must be a finite number, got None."),
    ({"whole": 1.5}, "Settings.whole must be a whole number, got 1.5."),
    ({"mode": 3}, "Settings.mode must be one of mean, none, std, got 3."),
    ({"either": 3}, "Settings.either must be one of none, old, or a Part, got 3."),
    ({"part": 3}, "Settings.part must be a Part, got 3."),
    ({"maybe": "Constant"}, "Settings.maybe must be a Part, or None, got 'Constant'."),
    ({"ratio": 3}, "Settings.ratio must be a Ratio, got 3."),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(wrong)[:40] for wrong, _ in WRONG])
def test_what_a_type_does_not_allow_is_refused_as_it_is_made(wrong, message):
    with pytest.raises(InputError) as caught:
        Settings(**wrong)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "men"}, "Settings.mode must be one of mean, none, std; got 'men', did you mean 'mean'?"),
        ({"mode": "zzz"}, "Settings.mode must be one of mean, none, std; got 'zzz'."),
        ({"either": "odl"}, "Settings.either must be one of none, old, or a Part; got 'odl', did you mean 'old'?"),
    ],
)
def test_a_name_that_is_none_of_the_choices_gets_the_nearest(wrong, message):
    with pytest.raises(UnknownName) as caught:
        Settings(**wrong)
    assert str(caught.value) == message


def test_a_node_of_another_kind_does_not_stand_in_for_a_part():
    """Although it can be called: a field says which nodes it takes."""
    for wrong in (Constant(), Settings()):
        with pytest.raises(InputError, match=r"Settings\.ratio must be a Ratio, got"):
            Settings(ratio=wrong)


def test_annotations_that_cannot_be_read_ask_for_nothing():
    def built(first: Missing, second: Share = 0.5):  # noqa: F821
        return first, second

    assert demands(built) == {}
    assert Demand().holds(object())
    assert {name for name in demands(Settings) if name not in Settings.__dataclass_fields__} == set()
    assert demands(Settings).keys() == Settings.__dataclass_fields__.keys() - {"text", "pair"}


@pytest.mark.parametrize(
    ("build", "wrong", "message"),
    [
        ("language", {"max_tokens": 3}, "no language() argument 'max_tokens'; did you mean 'max_new_tokens'?"),
        ("language", {"use_dora": True}, "no language() argument 'use_dora'; did you mean lora={'use_dora': ...}?"),
        ("language", {"num_generations": 4}, "did you mean the setting 'group_size' of the run?"),
        ("language", {"temperatur": 1}, "no language() argument 'temperatur'; did you mean 'temperature'?"),
        ("conversation", {"max_assistant_turns": 3}, "argument 'max_assistant_turns'; did you mean 'max_turns'?"),
        ("pipeline", {"guidance_scale": 3}, "no pipeline() argument 'guidance_scale'; did you mean 'guidance'?"),
        ("flow", {"num_inference_steps": 3}, "no flow() argument 'num_inference_steps'; did you mean 'steps'?"),
    ],
)
def test_a_keyword_of_another_library_leads_to_ours(build, wrong, message):
    with pytest.raises(UnknownName) as caught:
        getattr(stepwell, build)("nowhere", **wrong)
    assert message in str(caught.value)


def test_what_a_list_holds_is_checked():
    from stepwell.sampling.rollout import rollout

    process = markov(symbols=2, length=2)
    for requests, wrong in (([Request(Prompt(0, 0)), 3], "3"), (["a"], "'a'")):
        with pytest.raises(InputError, match=f"^Each of requests must be a Request, got {wrong}"):
            rollout(process, requests, Rng(0))
    with pytest.raises(InputError, match=r"^rng must be a Rng, got 0"):
        rollout(process, [Request(Prompt(0, 0))], 0)


def test_ranges_need_no_torch():
    """Commands that load no model read options through them."""
    code = "import sys, stepwell.ranges; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
