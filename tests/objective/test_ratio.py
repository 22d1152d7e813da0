"""The log-ratio at every level equals its plain definition, and steps that are not trained never matter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.batch import Read
from stepwell.errors import InputError, UnknownName
from stepwell.objective.ratio import LogClip, MixtureDenominator, PerSource, Ratio, runs
from stepwell.rng import Rng

LEVELS = ("token", "segment", "turn", "sequence", "sequence_token")
MEANS = ("geometric", "product")
SHAPE = (4, 6)
ROUNDING = 1e-13  # sums of six numbers of order one


def numbers(seed, *shape):
    return Rng(seed).normal(*shape, dtype=torch.float64)


def example(batch_of, seed=0, mask=None, **fields):
    """Rows with holes and padding, three segments and two turns a row, and a present policy with a gradient."""
    if mask is None:
        mask = Rng(seed).uniform(*SHAPE) < 0.7
    present = numbers(seed + 1, *SHAPE).requires_grad_()
    steps = torch.arange(SHAPE[1]).expand(*SHAPE)
    plain = {
        "behaviour": numbers(seed + 2, *SHAPE),
        "old_log_prob": numbers(seed + 3, *SHAPE),
        "reference_log_prob": numbers(seed + 4, *SHAPE),
        "segment": (steps // 2).contiguous(),
        "info": {"turn": (steps // 3).contiguous()},
    }
    return batch_of(present, mask=mask, **{**plain, **fields})


def by_hand(batch, level, mean):
    """The value at every trained step, 0 elsewhere, with plain Python numbers."""
    d, mask = (batch.log_prob - batch.old).tolist(), batch.rows.mask.tolist()
    keys = {
        "token": lambda i, t: t,
        "segment": lambda i, t: int(batch.rows.segment[i, t]),
        "turn": lambda i, t: int(batch.field("turn")[i, t]),
        "sequence": lambda i, t: 0,
        "sequence_token": lambda i, t: 0,
    }
    answer = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, row in enumerate(d):
        for t in range(len(row)):
            if not mask[i][t]:
                continue
            key = keys[level]
            members = [row[u] for u in range(len(row)) if mask[i][u] and key(i, u) == key(i, t)]
            answer[i, t] = sum(members) / (len(members) if mean == "geometric" else 1)
    return answer


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_every_level_equals_its_plain_definition(batch_of, level, mean, seed):
    """It is zero where nothing is trained."""
    batch = example(batch_of, seed)
    assert torch.allclose(Ratio(level, mean)(batch), by_hand(batch, level, mean), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_what_stands_at_steps_that_are_not_trained_never_matters(batch_of, level, mean, seed):
    batch = example(batch_of, seed)
    noise = 9 * numbers(seed + 7, *SHAPE) * ~batch.rows.mask
    rows = batch.rows.replace(
        old_log_prob=batch.rows.old_log_prob + noise,
        segment=torch.where(batch.rows.mask, batch.rows.segment, 2),
    )
    moved = (batch.log_prob.detach() - noise).requires_grad_()
    other = dataclasses.replace(batch, rows=rows, scores=dataclasses.replace(batch.scores, log_prob=moved))
    ratio, weight = Ratio(level, mean), numbers(seed + 8, *SHAPE)
    first, second = ratio(batch), ratio(other)
    assert torch.allclose(first, second, rtol=0, atol=ROUNDING)
    slopes = [
        torch.autograd.grad((value * weight).sum(), leaf)[0]
        for value, leaf in ((first, batch.log_prob), (second, moved))
    ]
    assert torch.allclose(*slopes, rtol=0, atol=ROUNDING)
    assert not bool((slopes[0] * ~batch.rows.mask).any())


@pytest.mark.parametrize("mean", MEANS)
def test_segments_of_one_token_are_tokens_and_one_segment_is_the_sequence(batch_of, mean):
    steps = torch.arange(SHAPE[1]).expand(*SHAPE).contiguous()
    single = example(batch_of, segment=steps)
    assert torch.allclose(Ratio("segment", mean)(single), Ratio()(single), rtol=0, atol=ROUNDING)
    whole = example(batch_of, segment=torch.full(SHAPE, 3))
    assert torch.allclose(Ratio("segment", mean)(whole), Ratio("sequence", mean)(whole), rtol=0, atol=ROUNDING)


def test_a_turn_is_a_segment_where_no_turns_are_told(batch_of):
    batch = example(batch_of, info={})
    assert torch.equal(Ratio("turn")(batch), Ratio("segment")(batch))
    assert not torch.equal(Ratio("turn")(example(batch_of)), Ratio("segment")(batch))


def test_gspo_token_has_the_value_of_the_sequence(batch_of):
    """Its gradient is that of the token."""
    batch, weight = example(batch_of), numbers(5, *SHAPE)
    token, sequence, both = (Ratio(level)(batch) for level in ("token", "sequence", "sequence_token"))
    assert torch.allclose(both, sequence, rtol=0, atol=ROUNDING)
    slopes = [torch.autograd.grad((v * weight).sum(), batch.log_prob)[0] for v in (token, sequence, both)]
    assert torch.equal(slopes[2], slopes[0])
    assert not torch.allclose(slopes[2], slopes[1], atol=0.1)


def test_gspo_token_is_gspo_where_the_advantage_is_constant_in_a_row(batch_of):
    batch = example(batch_of)
    weight = (batch.mask / batch.steps) * numbers(6, SHAPE[0], 1)
    slopes = [
        torch.autograd.grad((Ratio(level)(batch).exp() * weight).sum(), batch.log_prob)[0]
        for level in ("sequence", "sequence_token")
    ]
    assert torch.allclose(*slopes, rtol=0, atol=ROUNDING)


def test_the_denominator_is_the_one_that_was_named(batch_of):
    batch = example(batch_of)
    present, mask = batch.log_prob.detach(), batch.mask
    assert torch.equal(Ratio(denominator="old")(batch), (present - batch.rows.old_log_prob) * mask)
    assert torch.equal(Ratio(denominator="behaviour")(batch), (present - batch.rows.log_prob) * mask)
    own = Ratio("sequence", denominator="none")(batch)
    assert not bool(own.any())
    assert bool(torch.autograd.grad(own.sum(), batch.log_prob)[0].any())


def test_the_old_policy_is_the_sampler_where_it_was_not_scored_anew(batch_of):
    batch = example(batch_of, old_log_prob=None)
    assert torch.equal(Ratio()(batch), Ratio(denominator="behaviour")(batch))


def test_a_mixture_is_the_weighted_sum_of_probabilities(batch_of):
    batch = example(batch_of, info={"teacher": numbers(9, *SHAPE)})
    mixture = MixtureDenominator((("old", 0.2), ("behaviour", 0.3), ("reference", 0.4), ("teacher", 0.1)))
    rows = batch.rows
    parts = (rows.old_log_prob, rows.log_prob, rows.reference_log_prob, rows.info["teacher"])
    mixed = sum(weight * part.exp() for weight, part in zip((0.2, 0.3, 0.4, 0.1), parts, strict=True))
    expected = (batch.log_prob - mixed.log()) * batch.mask
    assert torch.allclose(Ratio(denominator=mixture)(batch), expected, rtol=0, atol=ROUNDING)


def test_a_mixture_denominator_is_unbiased_for_rows_of_the_mixture(batch_of):
    present, behaviour, old = [numbers(i, 5, 1).log_softmax(0) for i in range(3)]
    batch = batch_of(present, behaviour=behaviour, old_log_prob=old)
    drawn = 0.5 * behaviour.exp() + 0.5 * old.exp()
    ratio = Ratio(denominator=MixtureDenominator())(batch).exp()
    values = numbers(4, 5, 1)
    exact = float((present.exp() * values).sum())
    assert float((drawn * ratio * values).sum()) == pytest.approx(exact, abs=1e-14)
    wrong = Ratio(denominator="old")(batch).exp()
    assert abs(float((drawn * wrong * values).sum()) - exact) > 0.01


def gmpo(difference, advantage):
    """Each token's log-ratio clipped on the side of its advantage, before the mean is taken."""
    clipped = difference.clamp(-0.4, 0.4)
    return torch.where(advantage > 0, torch.minimum(difference, clipped), torch.maximum(difference, clipped))


def test_the_hook_sees_every_token_and_its_advantage_before_aggregation(batch_of):
    batch, advantage = example(batch_of), numbers(11, *SHAPE)
    found = Ratio("sequence", hook=gmpo)(batch, advantage)
    difference, mask = (batch.log_prob - batch.old).tolist(), batch.rows.mask.tolist()
    for i, row in enumerate(difference):
        kept = [min(d, 0.4) if float(advantage[i, t]) > 0 else max(d, -0.4) for t, d in enumerate(row) if mask[i][t]]
        for t in range(SHAPE[1]):
            expected = math.fsum(kept) / len(kept) if mask[i][t] else 0.0
            assert float(found[i, t].detach()) == pytest.approx(expected, abs=ROUNDING)
    after = Ratio("sequence")(batch)
    assert not torch.allclose(found, gmpo(after, advantage) * batch.mask, atol=0.05)  # the planted order


def test_a_hook_has_no_effect_on_steps_that_are_not_trained(batch_of):
    """Although it makes values up for them."""
    batch = example(batch_of)
    shifted = Ratio("sequence", "product", hook=lambda d, a: d + 1.0)(batch)
    expected = (Ratio("sequence", "product")(batch) + batch.steps) * batch.mask
    assert torch.allclose(shifted, expected, rtol=0, atol=ROUNDING)


def test_names_that_are_none_are_refused_where_they_are_written():
    with pytest.raises(UnknownName, match="did you mean 'sequence'"):
        Ratio("sequense")
    with pytest.raises(UnknownName, match="did you mean 'product'"):
        Ratio("sequence", "produkt")


def test_a_denominator_that_is_none_is_refused():
    with pytest.raises(UnknownName, match="got 'odl', did you mean 'old'"):
        Ratio(denominator="odl")
    with pytest.raises(InputError, match=r"Ratio.denominator must be one of behaviour, none, old, or a Part, got 3\."):
        Ratio(denominator=3)


def test_segments_that_were_not_told_are_missed(batch_of):
    with pytest.raises(InputError, match="reads 'segment'"):
        Ratio("segment")(example(batch_of, segment=None))


def test_without_turns_or_segments_a_turn_is_a_run_of_trained_steps(batch_of):
    mask = torch.tensor([[True, True, False, True, False, True], [False, True, True, True, True, False]])
    assert runs(mask).tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1]]
    mask = torch.cat([mask, mask.flip(1)])
    batch = example(batch_of, mask=mask, segment=None, info=None)
    segmented = example(batch_of, mask=mask, segment=runs(mask), info=None)
    for mean in MEANS:
        assert torch.equal(Ratio("turn", mean)(batch), Ratio("segment", mean)(segmented))
    whole = batch_of(batch.log_prob, behaviour=batch.behaviour, old_log_prob=batch.old)
    turn, sequence = Ratio("turn")(whole), Ratio("sequence")(whole)  # one turn without a break
    assert torch.allclose(turn, sequence, rtol=0, atol=ROUNDING)


@given(st.lists(st.floats(-2, 2), min_size=6, max_size=6), st.sampled_from([-1.0, 1.0]), st.floats(0.05, 1))
@settings(deadline=None)
def test_a_log_clip_bounds_what_went_on_and_leaves_what_came_back(values, sign, bound):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = LogClip(bound, 2 * bound)(x, torch.full_like(x, sign))
    expected = [min(v, 2 * bound) if sign > 0 else max(v, -bound) for v in values]
    assert found.tolist() == expected
    slope = torch.autograd.grad(found.sum(), x)[0]
    assert all(g == 0 for g, v in zip(slope.tolist(), values, strict=True) if sign * v > 2 * bound)


def test_rows_of_another_source_have_another_denominator(batch_of):
    source = torch.tensor([0, 1, 0, 2])
    batch = example(batch_of, source=source, mask=torch.ones(SHAPE, dtype=torch.bool))
    mixture = MixtureDenominator((("old", 0.75), ("behaviour", 0.25)))
    found = Ratio(denominator=PerSource(mixture))(batch).exp()
    pi, old, behaviour = (x.exp() for x in (batch.log_prob, batch.old, batch.behaviour))
    expected = torch.where((source > 0)[:, None], pi / (0.75 * old + 0.25 * behaviour), pi / old)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    assert PerSource().reads == {Read("policy", "log_prob")}


def test_only_the_level_of_segments_reads_segments():
    assert Ratio("segment").reads == {Read("rows", "segment")}
    assert not any(Ratio(level).reads for level in LEVELS if level != "segment")
