"""Credit among the samples of a prompt equals brute force over plain lists, for every setting and ragged groups."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Batch, Read
from stepwell.columns import Columns
from stepwell.credit.group import Best, GroupCredit
from stepwell.errors import InputError, UnknownName
from stepwell.objective.regularise import Divergence
from stepwell.parts import Part
from stepwell.trajectories import count, make


def batch(rewards, prompts=None, **info):
    """Rows of one step with these rewards, groups and `info` entries."""
    number = len(rewards)
    rows = make(
        torch.zeros(number, 1, dtype=torch.long),
        torch.zeros(number, 1, dtype=torch.float64),
        torch.ones(number, 1, dtype=torch.bool),
        prompt=torch.tensor(prompts or [0] * number),
        reward=torch.tensor(rewards, dtype=torch.float64),
        info=Columns({name: torch.tensor(entry) for name, entry in info.items()}, number),
    )
    return Batch(rows, count(rows))


def brute_force(rewards, keys, center, scale, ddof, singleton, epsilon):
    """A_i row by row, from plain lists."""

    def deviation(values):
        return math.sqrt(sum((v - statistics.fmean(values)) ** 2 for v in values) / max(len(values) - ddof, 1))

    answer = []
    for place, (reward, key) in enumerate(zip(rewards, keys, strict=True)):
        group = [r for r, k in zip(rewards, keys, strict=True) if k == key]
        others = [r for i, (r, k) in enumerate(zip(rewards, keys, strict=True)) if k == key and i != place]
        alone = not others and (center in ("mean", "leave-one-out") or scale == "std")
        if alone:
            value = reward if singleton == "reward" else 0.0
        else:
            baseline = {
                "none": 0.0,
                "mean": statistics.fmean(group),
                "leave-one-out": statistics.fmean(others or [0.0]),
                "batch": statistics.fmean(rewards),
            }[center]
            value = reward - baseline
        if scale == "std" and not alone:
            value /= deviation(group) + epsilon
        elif scale == "batch-std":
            value /= deviation(rewards) + epsilon
        elif scale == "mean":
            value /= statistics.fmean(group) + epsilon
        answer.append(value)
    return answer


@st.composite
def ragged(draw):
    number = draw(st.integers(1, 9))
    lists = lambda values: draw(st.lists(values, min_size=number, max_size=number))  # noqa: E731
    rewards = lists(st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.5]))
    return rewards, lists(st.integers(0, 3)), lists(st.integers(0, 1))


@pytest.mark.parametrize("scale", ["none", "std", "batch-std", "mean"])
@pytest.mark.parametrize("center", ["none", "mean", "leave-one-out", "batch"])
@given(drawn=ragged(), ddof=st.sampled_from([0, 1]), singleton=st.sampled_from(["zero", "reward"]), both=st.booleans())
@settings(deadline=None, max_examples=30)
def test_credit_equals_brute_force(center, scale, drawn, ddof, singleton, both):
    rewards, prompts, bundles = drawn
    names = ("prompt", "bundle") if both else ("prompt",)
    keys = list(zip(prompts, bundles, strict=True)) if both else prompts
    credit = GroupCredit(center, scale, names, 0.1, ddof, singleton)
    found = credit(batch(rewards, prompts, bundle=bundles)).tolist()
    expected = brute_force(rewards, keys, center, scale, ddof, singleton, 0.1)
    assert found == pytest.approx(expected, abs=1e-11)  # rewards of order one over scales of at least 0.1


def test_groups_may_cross_prompts():
    credit = GroupCredit("mean", keys=("bundle",))
    assert credit(batch([1.0, 2.0, 3.0, 6.0], [0, 1, 2, 3], bundle=[7, 5, 7, 5])).tolist() == [-1.0, -2.0, 1.0, 2.0]


def test_leave_one_out_is_the_mean_centred_reward_times_g_over_g_minus_one():
    rewards = [0.3, 1.0, -2.0, 0.5]
    mean, out = (GroupCredit(center)(batch(rewards)) for center in ("mean", "leave-one-out"))
    assert torch.allclose(out, 4 / 3 * mean, rtol=0, atol=1e-14)


def test_a_standardised_group_has_the_numbers_of_trl():
    """TRL 1.16: torch.std, ddof 1, plus 1e-4; `batch` takes the deviation of all rewards and the group's mean."""
    rewards, prompts = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0] * 4 + [1] * 4
    found = GroupCredit("mean", "std")(batch(rewards, prompts)).tolist()
    even, uneven = math.sqrt(1 / 3), 0.5
    first, second = 0.5 / (even + 1e-4), 0.25 / (uneven + 1e-4)
    assert found[:4] == pytest.approx([first, -first, -first, first], rel=1e-12)
    assert found[4:] == pytest.approx([second, second, second, -3 * second], rel=1e-12)
    assert found[0] == pytest.approx(0.86588, abs=5e-6)
    whole = GroupCredit("mean", "batch-std")(batch(rewards, prompts)).tolist()
    spread = statistics.stdev(rewards) + 1e-4
    assert whole == pytest.approx(
        [0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread] + [0.25 / spread] * 3 + [-0.75 / spread]
    )


@pytest.mark.parametrize("center", ["mean", "leave-one-out"])
def test_a_group_of_equals_teaches_nothing(center):
    assert GroupCredit(center, "std")(batch([2.0, 2.0, 2.0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("center", ["mean", "leave-one-out"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 6, 7, 8])
def test_equals_whose_mean_is_rounded_are_equals_nonetheless(center, kind, size):
    for reward in (0.1, 0.7, 100.1, 1e6 + 0.1):  # their mean in float32 is off by up to 6e-2, far more than epsilon
        given = batch([reward] * size)
        given = Batch(given.rows.replace(log_prob=given.rows.log_prob.to(kind)), given.counts)
        for scale in ("none", "std"):
            assert GroupCredit(center, scale)(given).tolist() == [0.0] * size


@pytest.mark.parametrize("center", ["none", "mean", "leave-one-out", "batch"])
def test_a_group_of_one_is_never_divided_by_its_own_deviation(center):
    rewards, prompts = [3.0, 1.0, 2.0], [0, 1, 1]
    for singleton, expected in (("zero", 0.0), ("reward", 3.0)):
        assert GroupCredit(center, "std", singleton=singleton)(batch(rewards, prompts))[0] == expected


def test_the_reward_may_be_any_part():
    @dataclass(frozen=True)
    class Twice(Part):
        def __call__(self, batch):
            return 2 * batch.reward

    assert GroupCredit("mean", reward=Twice())(batch([1.0, 2.0])).tolist() == [-1.0, 1.0]
    assert GroupCredit(reward=Divergence("k2")).reward.reads == {Read("reference", "log_prob")}


@pytest.mark.parametrize(
    ("credit", "kept"),
    [
        (Best(), [0, 1, 0, 0, 1, 0, 1]),  # the first of the two best of the first group, the first of equals
        (Best(skip_equal=True), [0, 1, 0, 0, 0, 0, 1]),
        (Best("above-mean"), [0, 1, 1, 0, 1, 1, 1]),
        (Best("above-mean", skip_equal=True), [0, 1, 1, 0, 0, 0, 1]),
        (Best("positive"), [1, 1, 1, 0, 1, 1, 0]),
        (Best("positive", threshold=1.5), [0, 1, 1, 0, 1, 1, 0]),
    ],
    ids=str,
)
def test_the_best_are_those_of_their_kind_at_a_mean_weight_of_one(credit, kept):
    rewards, prompts = [1.0, 4.0, 4.0, -1.0, 2.0, 2.0, -3.0, -5.0], [0, 0, 0, 0, 1, 1, 2, 2]
    found = credit(batch(rewards, prompts))
    kept = torch.tensor([*kept, 0], dtype=torch.float64)
    assert torch.allclose(found, kept * len(kept) / kept.sum(), rtol=0, atol=1e-14)
    assert float(found.mean()) == pytest.approx(1.0)


def test_nothing_is_imitated_where_nothing_is_good():
    assert Best("positive")(batch([-1.0, 0.0])).tolist() == [0.0, 0.0]
    assert Best(skip_equal=True)(batch([1.0, 1.0])).tolist() == [0.0, 0.0]


@dataclass(frozen=True)
class BatchMean(GroupCredit):
    """The mistake of statistics over the batch in place of the group."""

    def __call__(self, batch):
        reward = self.reward(batch)
        return (reward - reward.mean()) / (reward.std() + self.epsilon)


def test_a_planted_statistic_differs_from_brute_force():
    rewards, prompts = [1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1]
    expected = brute_force(rewards, prompts, "mean", "std", 1, "zero", 1e-4)
    assert GroupCredit("mean", "std")(batch(rewards, prompts)).tolist() == pytest.approx(expected)
    assert BatchMean("mean", "std")(batch(rewards, prompts)).tolist() != pytest.approx(expected, abs=0.1)


def test_names_that_are_none_are_refused_where_they_are_written():
    for wrong, said in (
        (lambda: GroupCredit("median"), r"GroupCredit\.center must be one of batch, .*, none; got 'median'"),
        (lambda: GroupCredit(scale="stdd"), "did you mean 'std'"),
        (lambda: GroupCredit(singleton="zeros"), "did you mean 'zero'"),
        (lambda: Best("tops"), "did you mean 'top'"),
    ):
        with pytest.raises(UnknownName, match=said):
            wrong()
    with pytest.raises(InputError, match="reads 'bundles' of the rows"):
        GroupCredit(keys=("bundles",))(batch([1.0], bundle=[0]))
