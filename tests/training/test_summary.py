"""The numbers of a step's rows, each worked out by hand, and the few completions that are shown of them."""

from __future__ import annotations

import warnings

import pytest
import torch

import stepwell as sw
from stepwell import Prompt, Request, Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.rollout import rollout
from stepwell.training import summary
from stepwell.trajectories import PROVENANCES

OTHER = PROVENANCES[1]


@pytest.fixture
def drawn():
    """Six rows of two prompts, the last of the second prompt by another hand, with two rewards."""
    process = sw.exact.markov(symbols=3, length=4, prompts=2)
    made = rollout(process, [Request(Prompt(n, n), count=3) for n in range(2)], Rng(0))
    length = torch.tensor([1, 2, 3, 4, 4, 2])
    rows = made.trajectories.replace(
        reward=torch.tensor([1.0, 1.0, 1.0, 4.0, 2.0, 9.0]),
        rewards=torch.tensor([[1.0, 0.0], [1.0, float("nan")], [1.0, 3.0], [1.0, 3.0], [6.0, 0.0], [7.0, 2.0]]),
        length=length,
        mask=torch.arange(4) < length[:, None],
        truncated=torch.tensor([True, False, False, True, False, True]),
        provenance=torch.tensor([0, 0, 0, 0, 0, 1]),
    )
    return Drawn(rows, made.samples, made.prompts)


def test_every_number_is_that_of_the_rows_of_one_hand(drawn):
    rows = drawn.trajectories
    found = summary.row_metrics(rows, ["one", "two"])
    deviation = (((torch.tensor([1.0, 1, 1, 4, 2]) - 1.8) ** 2).mean()) ** 0.5
    assert found == pytest.approx(
        {
            "reward": 1.8,
            "reward_deviation": float(deviation),
            "reward/one": 2.0,
            "reward/two": 1.5,  # of four rows: one reward had no answer
            "length": 2.8,
            "truncated": 0.4,
            f"{OTHER}/reward": 9.0,
            f"{OTHER}/reward_deviation": 0.0,
            f"{OTHER}/reward/one": 7.0,
            f"{OTHER}/reward/two": 2.0,
            f"{OTHER}/length": 2.0,
            f"{OTHER}/truncated": 1.0,
            "tied_groups": 0.5,
        }
    )


def test_a_single_reward_has_no_second_name_and_rows_without_one_have_none(drawn):
    rows = drawn.trajectories
    assert "reward/one" not in summary.row_metrics(rows, ["one"])
    without = summary.row_metrics(rows.replace(reward=None, rewards=None), [])
    assert without.keys() == {"length", "truncated", f"{OTHER}/length", f"{OTHER}/truncated"}


def test_the_length_of_a_language_counts_what_was_drawn_and_that_of_a_flow_all_steps(drawn):
    rows = drawn.trajectories
    told = rows.replace(mask=rows.mask & (torch.arange(4) != 1))  # an environment wrote the second step
    assert summary.row_metrics(told, [])["length"] == pytest.approx((1 + 1 + 2 + 3 + 3) / 5)
    flow = told.replace(action=told.action.double())
    assert summary.row_metrics(flow, [])["length"] == pytest.approx((1 + 2 + 3 + 4 + 4) / 5)


def test_groups_are_tied_among_rows_with_an_end_and_only_where_there_are_two(drawn):
    rows = drawn.trajectories
    first = rows.replace(outcome=torch.tensor([True, True, False, True, False, False]))
    assert summary.row_metrics(first, [])["tied_groups"] == 1.0  # the second prompt has one row left
    none = rows.replace(outcome=torch.tensor([True, False, False, True, False, False]))
    assert "tied_groups" not in summary.row_metrics(none, [])
    low = rows.replace(reward=-rows.reward)
    assert summary.row_metrics(low, [])["tied_groups"] == 0.5


TIED, FREE = {"tied_groups": 1.0}, {"tied_groups": 0.9}


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([TIED] * 3, True),
        ([TIED] * 2, False),
        ([FREE, TIED, TIED, TIED], True),
        ([TIED, FREE, TIED, TIED], False),
        ([TIED] * 4, False),  # it was said a step ago
        ([TIED, TIED, TIED, FREE, TIED, TIED, TIED], False),
        ([TIED, TIED, {}], False),
    ],
)
def test_ties_are_warned_of_once_and_after_three_steps(history, said):
    objective = sw.methods.get("grpo").recipe().whole
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary.warn_of_ties(objective, history)
    assert [("For 3 steps" in str(each.message)) for each in caught] == [True] * said


def test_ties_are_nothing_to_a_method_that_compares_no_rows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary.warn_of_ties(sw.methods.get("reinforce").recipe().whole, [TIED] * 3)


def test_completions_are_spread_over_the_rollout_with_all_that_is_known_of_them(drawn):
    made = drawn
    shown = summary.completions(made, ["one", "two"], 7, 3)
    assert [entry["prompt"] for entry in shown] == [0, 0, 1]
    assert [entry["reward"] for entry in shown] == [1.0, 1.0, 2.0]
    assert [entry["completion"] for entry in shown] == [made.samples.values[row] for row in (0, 2, 4)]
    assert shown[2]["rewards"] == {"one": 6.0, "two": 0.0}
    assert {entry["step"] for entry in shown} == {7}
    assert all("origin" not in entry for entry in shown)
    every = summary.completions(made, ["one"], 7, 99)
    assert len(every) == 6
    assert every[5]["origin"] == OTHER
    assert "rewards" not in every[5]
    assert summary.completions(made, ["one"], 7, 0) == []
