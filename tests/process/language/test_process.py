"""The laws every process has to keep, for causal language models: ratio 1, forks, seeds, and an exact meter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepwell.check.tolerance import rounding
from stepwell.distributions import Categorical
from stepwell.errors import InputError, MissingAbility, StepwellError
from stepwell.process.base import Process
from stepwell.process.language import reading
from stepwell.process.language.build import language
from stepwell.process.language.network import CausalNetwork
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.record import Drawn
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories

Build = Callable[..., Language]
PROMPTS = ["a b c d", "e", "f g h a b c d e f g", "a b c d"]
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
}


SINGLE = rounding(torch.float32, 740)
"""Float32's rounding of a log-probability: as many products are summed in the largest of the small models."""


def draw(process: Process, seed: int = 0, count: int = 4, branch: bool = False) -> Drawn:
    """A group for each of the mixed-length prompts; with `branch`, more rows from the middle of rows drawn."""
    requests = [Request(Prompt(i, text), count=count + i) for i, text in enumerate(PROMPTS)]
    drawn = rollout(process, requests, Rng(seed))
    if not branch:
        return drawn
    trunk = drawn.trajectories
    rows = (trunk.length >= 3).nonzero()[:4, 0].tolist()
    forks = [Request(drawn.prompts[row], count=3, start=(row, 2)) for row in rows]
    return drawn + rollout(process, forks, Rng(seed + 1), so_far=trunk)


def gap(process: Process, rows: Trajectories) -> float:
    """How far the score is from what was stored while drawing, at worst."""
    with torch.no_grad():
        return float((process.score(rows).log_prob - rows.log_prob).abs().max())


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_score_equals_what_was_stored_while_drawing(small_language: Build, architecture: str, truncation: str) -> None:
    process = small_language(architecture, **TRUNCATIONS[truncation])
    drawn = (draw(process, seed, branch=True).trajectories for seed in range(20))
    rows = next(rows for rows in drawn if len(rows.length.unique()) > 2)  # of many lengths, or it were no test
    assert gap(process, rows) <= SINGLE
    assert process.network.fast


@pytest.mark.parametrize("architecture", ["llama", "granite", "cohere", "gpt2"])
def test_score_equals_what_was_stored_to_the_last_digits_in_double(small_language: Build, architecture: str) -> None:
    process = small_language(architecture, dtype="float64", top_p=0.95)
    assert gap(process, draw(process, branch=True).trajectories) <= 1e-10
    assert process.network.fast  # logit scales are known to the fast path


@pytest.mark.parametrize("architecture", ["gemma2", "bloom"])  # a sliding window and soft caps; no positions at all
def test_score_equals_what_was_stored_for_unusual_models(small_language: Build, architecture: str) -> None:
    process = small_language(architecture, max_new_tokens=16)
    assert gap(process, draw(process, branch=True).trajectories) <= SINGLE
    assert process.network.fast


def test_logits_that_are_not_numbers_are_an_error(small_language: Build) -> None:
    process = small_language("qwen2")
    with torch.no_grad():
        next(process.module.parameters()).fill_(torch.nan)
    with pytest.raises(StepwellError, match="diverged"):
        draw(process)


def test_score_is_near_what_was_stored_in_half_precision(small_language: Build) -> None:
    process = small_language("llama", dtype="bf16")
    rows = draw(process).trajectories
    assert rows.log_prob.dtype == torch.float32
    assert gap(process, rows) < 0.2  # bfloat16 keeps 8 bits; logits here are below 10


def test_forgotten_positions_are_caught(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    process = small_language("gpt2")
    columns = lambda self, mask: torch.arange(mask.shape[1]).expand(mask.shape)  # noqa: E731
    monkeypatch.setattr(CausalNetwork, "position_ids", columns)
    assert gap(process, draw(process).trajectories) > 1e-2


class UntruncatedCategorical(Categorical):
    """Draws from one distribution and reports the log-probabilities of another."""

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        return super().log_prob(action) - 0.1


def test_log_probabilities_of_another_distribution_are_caught(
    small_language: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = small_language("qwen2", top_k=3)
    untruncated = small_language("qwen2")
    rows = draw(process).trajectories
    with torch.no_grad():
        wrong = rows.replace(log_prob=untruncated.score(rows).log_prob)
    assert gap(process, wrong) > 1e-2
    honest = process.propose
    monkeypatch.setattr(process, "propose", lambda state: UntruncatedCategorical(honest(state).logits))
    assert gap(process, draw(process).trajectories) > 1e-2


def test_a_cache_that_forgets_to_fork_is_caught(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_rows(cache: Any, index: torch.Tensor | None) -> Any:
        return honest(cache, index if index is None else torch.arange(len(index)) % max(int(index.max()) + 1, 1))

    honest = reading.forked
    process = small_language("qwen2")
    monkeypatch.setattr(reading, "forked", first_rows)
    with pytest.warns(UserWarning, match="Prompts are not shared by their groups when drawing"):
        rows = draw(process).trajectories
    assert gap(process, rows) > 1e-2


def test_truncation_keeps_the_action_taken_after_an_update(small_language: Build) -> None:
    process = small_language("qwen2", top_k=2, top_p=0.7)
    rows = draw(process).trajectories
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    log_prob = process.score(rows).log_prob.detach()
    assert bool(log_prob.isfinite().all())
    assert float((log_prob - rows.log_prob).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_a_fork_has_the_distribution_of_its_original(small_language: Build, architecture: str) -> None:
    dtype, tolerance = ("float32", SINGLE) if architecture == "gemma2" else ("float64", 1e-10)
    process, rng = small_language(architecture, dtype=dtype, max_new_tokens=30), Rng(0)
    state = process.start(PROMPTS, rng)
    for _ in range(9):  # beyond gemma2's sliding window of 6
        state = process.advance(state, process.propose(state).sample(rng) % 20 + 8, rng)
    index = torch.tensor([2, 0, 0, 3, 2])
    fork_first = process.propose(state[index]).logits
    original_first = process.propose(state).logits
    assert torch.allclose(fork_first, original_first[index], atol=tolerance)

    fork = state[index]
    for _ in range(3):
        fork = process.advance(fork, torch.tensor([9, 10, 11, 12, 13]), rng)
        process.propose(fork)
    assert torch.equal(process.propose(state).logits, original_first), "continuing a fork touched its original"
    again = process.advance(state, torch.tensor([9, 9, 9, 9]), rng)
    fresh = process.start(PROMPTS, rng)
    for step in range(again.tokens.shape[1]):  # replayed without proposing in between: all tokens are read at once
        fresh = process.advance(fresh, again.tokens[:, step], rng)
    assert torch.allclose(process.propose(again).logits, process.propose(fresh).logits, atol=tolerance)


def test_order_batch_size_and_padding_change_no_distribution(small_language: Build) -> None:
    for dtype, tolerance in (("float64", 1e-10), ("float32", SINGLE)):
        for architecture in ("qwen2", "gpt2"):
            process, rng = small_language(architecture, dtype=dtype), Rng(0)
            together = process.propose(process.start(PROMPTS, rng)).logits
            backwards = process.propose(process.start(PROMPTS[::-1], rng)).logits.flip(0)
            alone = torch.cat([process.propose(process.start([prompt], rng)).logits for prompt in PROMPTS])
            assert float((together - backwards).abs().max()) < tolerance
            assert float((together - alone).abs().max()) < tolerance
            rows = draw(process).trajectories
            with torch.no_grad():
                whole = process.score(rows).log_prob
                single = torch.cat([process.score(rows[i : i + 1]).log_prob for i in range(len(rows))])
            assert float((whole - single).abs().max()) < tolerance


def test_done_rows_stay_as_they_are(small_language: Build) -> None:
    process, rng = small_language("qwen2", max_new_tokens=3), Rng(0)
    state = process.advance(process.start(["a", "b"], rng), torch.tensor([1, 9]), rng)
    before = process.meter.spent
    distribution = process.propose(state)
    assert (process.meter.spent - before).model_evaluations == 1  # the done row is not read
    assert distribution.logits[0].exp()[process.pad] == 1.0
    for _ in range(2):
        state = process.advance(state, torch.tensor([5, 9]), rng)
    assert state.done.tolist() == [True, True]
    samples = process.finish(state)
    assert samples.columns["completion_ids"] == [[1], [9, 9, 9]]
    assert samples.truncated == [False, True]


def test_the_same_seed_gives_the_same_trajectories_bit_for_bit(small_language: Build) -> None:
    process = small_language("qwen2", temperature=0.9, top_p=0.9)
    first, again, other = (draw(process, seed, branch=True) for seed in (3, 3, 4))
    assert torch.equal(first.trajectories.action, again.trajectories.action)
    assert torch.equal(first.trajectories.log_prob, again.trajectories.log_prob)
    assert first.samples.values == again.samples.values
    assert first.samples.values != other.samples.values


@pytest.mark.parametrize("tokens_at_once", [None, 25])
def test_the_meter_counts_what_the_network_reads(small_language: Build, tokens_at_once: int | None) -> None:
    process = small_language("qwen2", tokens_at_once=tokens_at_once)
    reference = process.frozen()
    process.score(
        draw(process).trajectories, {"kl"}, reference=reference
    )  # the fast path checks itself on first use, unmetered
    seen = {"rows": 0, "tokens": 0}

    def count(_: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        ids, mask = arguments[0] if arguments else keywords["input_ids"], keywords["attention_mask"]
        seen["rows"] += len(ids)
        seen["tokens"] += int(mask[:, -ids.shape[1] :].sum())

    for language_model in (process, reference):
        language_model.network.causal.base_model.register_forward_pre_hook(count, with_kwargs=True)
    before = process.meter.spent
    rows = draw(process, seed=5).trajectories
    drawn = process.meter.spent - before
    assert (drawn.model_evaluations, drawn.forward, drawn.backward) == (seen["rows"], seen["tokens"], 0)
    lengths = [len(prompt.split()) for prompt in PROMPTS]
    assert drawn.forward <= sum(lengths[:3]) + int((rows.length - 1).sum())  # equal texts are read once

    with torch.no_grad():
        process.score(rows)
    scored = process.meter.spent - before - drawn
    expected = seen["tokens"] - drawn.forward
    own = int((rows.length - 1).sum())
    assert sum(lengths[:3]) + own <= expected <= sum(lengths[int(i)] for i in rows.prompt) + own
    assert (scored.model_evaluations, scored.forward, scored.backward) == (len(rows), expected, 0)
    process.score(rows, {"kl"}, reference=reference)
    learned = process.meter.spent - before - drawn - scored
    once = (seen["tokens"] - drawn.forward - expected) // 2
    assert (learned.model_evaluations, learned.forward, learned.backward) == (2 * len(rows), 2 * once, once)
    assert sum(lengths[:3]) + own <= once <= expected
    assert seen["tokens"] == (process.meter.spent - before).forward


def test_sub_batches_of_tokens_change_no_score(small_language: Build) -> None:
    process, cut = (small_language("gpt2", dtype="float64", tokens_at_once=n) for n in (None, 17))
    rows, needs = draw(process).trajectories, {"entropy", "hidden"}
    with torch.no_grad():
        whole, parts = process.score(rows, needs), cut.score(rows, needs)
    assert torch.allclose(whole.log_prob, parts.log_prob, atol=1e-12)
    assert all(torch.allclose(whole[need], parts[need], atol=1e-12) for need in needs)


def test_rows_are_scored_under_another_context(small_language: Build) -> None:
    process = small_language("qwen2", dtype="float64")
    hinted = rollout(process, [Request(Prompt(0, "a b"), count=3, context="z a b")], Rng(0)).trajectories
    assert gap(process, hinted) > 1e-2
    with torch.no_grad():
        under_hint = process.score(hinted, context=process.condition(["z a b"] * 3)).log_prob
    assert torch.allclose(under_hint, hinted.log_prob, atol=1e-10)


def test_the_value_head_starts_at_zero_and_learns(small_language: Build) -> None:
    process = small_language("qwen2")
    rows = draw(process).trajectories
    with pytest.raises(MissingAbility, match="with_value_head"):
        process.score(rows, {"value"})
    valued = process.with_value_head()
    assert "value" in valued.offers
    assert "value" not in process.offers
    value = valued.score(rows, {"value"})["value"]
    assert value.shape == rows.mask.shape
    assert float(value.detach().abs().max()) == 0.0
    value.sum().backward()
    gradients = {name: p.grad for name, p in valued.module.named_parameters() if name.startswith("value_head")}
    assert float(gradients["value_head.bias"]) == float(rows.mask.sum())
    assert valued.with_value_head().network.value_head is valued.network.value_head
    assert valued.network.causal is process.network.causal
    assert valued.meter is process.meter


def test_the_reference_is_a_copy_that_cannot_learn(small_language: Build) -> None:
    process = small_language("qwen2")
    rows = draw(process).trajectories
    with pytest.raises(MissingAbility, match="reference"):
        process.score(rows, {"kl"})
    reference = process.frozen()
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.mul_(1.1)
    assert not reference.score(rows).log_prob.requires_grad
    assert gap(reference, rows) <= SINGLE
    kl = process.score(rows, {"kl"}, reference=reference)["kl"]
    assert bool((kl[rows.mask] > 0).all())
    assert bool((kl[~rows.mask] == 0).all())
    reference.sync(process)
    assert float(process.score(rows, {"kl"}, reference=reference)["kl"].detach().abs().max()) < SINGLE
    assert reference.meter is process.meter


def test_dropout_never_touches_the_ratio(small_language: Build) -> None:
    process = small_language("gpt2", dtype="float64")
    rows = draw(process).trajectories
    process.module.train()  # as a training loop would; gpt2's dropout is 0.1
    assert gap(process, rows) <= 1e-10


def test_a_saved_model_is_loaded_again(small_language: Build, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    process = small_language("gpt2")
    rows = draw(process).trajectories
    process = process.with_value_head()
    assert process.network.value_head is not None
    torch.nn.init.constant_(process.network.value_head.weight, 0.25)
    process.save(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = language(tmp_path, device="cpu")
    assert gap(loaded, rows) <= SINGLE
    with torch.no_grad():
        assert torch.equal(loaded.score(rows, {"value"})["value"], process.score(rows, {"value"})["value"])
    with pytest.raises(InputError, match="same parameters"):
        loaded.sync(small_language("qwen2"))
