"""Recurrent and hybrid models: their states fork, padding never reaches them, and given words are read right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import stepwell as sw
from stepwell.check.tolerance import rounding
from stepwell.process.language import cache
from stepwell.process.language.build import language
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

PROMPTS = ["a b c d", "e", "f g h a b c d e f g", "a b c d"]
SIZES: dict[str, Any] = {"vocab_size": 34, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
                         "eos_token_id": 1, "bos_token_id": 2}  # fmt: skip
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
                             "max_position_embeddings": 64}  # fmt: skip
LINEAR: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                          "linear_value_head_dim": 8, "head_dim": 8, "layer_types": ["linear_attention",
                          "full_attention"]}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4)),
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**SIZES, **ATTENTION, layer_types=["conv", "full_attention"])
    ),
    "qwen3.5": lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SIZES, **ATTENTION, **LINEAR)),
}
SINGLE = rounding(torch.float32, 740 * 24)
"""Float32's rounding of a log-probability, relative to 1 + its size: a recurrent state sums products of all tokens, of
which texts have 24."""


@pytest.fixture(scope="module", params=MODELS)
def process(request: Any) -> Language:
    from conftest import word_tokenizer

    model, draws = MODELS[request.param](), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return language(model.eval(), word_tokenizer(), max_new_tokens=14)


def gap(process: Any, rows: Any) -> float:
    """The largest difference of drawn and scored log-probabilities, relative to 1 + their sizes."""
    with torch.no_grad():
        gaps = (process.score(rows).log_prob - rows.log_prob) * rows.mask
    return float((gaps / (1 + rows.log_prob.abs())).abs().max())


def test_forked_rows_of_unequal_prompts_score_as_they_were_drawn(process: Language) -> None:
    drawn = rollout(process, [Request(Prompt(i, text), count=3) for i, text in enumerate(PROMPTS)], Rng(0))
    rows = (drawn.trajectories.length >= 3).nonzero()[:4, 0].tolist()
    forks = [Request(drawn.prompts[row], count=2, start=(row, 2)) for row in rows]
    again = rollout(process, forks, Rng(1), so_far=drawn.trajectories)
    assert len(drawn.trajectories.length.unique()) > 1
    assert max(gap(process, drawn.trajectories), gap(process, again.trajectories)) <= SINGLE


def test_a_prompt_is_read_once_for_its_group(process: Language) -> None:
    before = process.meter.spent
    rows = rollout(process, [Request(Prompt(0, PROMPTS[2]), count=5)], Rng(2)).trajectories
    assert (process.meter.spent - before).forward <= len(PROMPTS[2].split()) + int((rows.length - 1).sum())


def test_going_on_with_a_fork_leaves_its_original_as_it_was(process: Language) -> None:
    state = process.start(PROMPTS, Rng(0))
    state = process.advance(state, torch.tensor([9, 10, 11, 12]), Rng(0))
    first = process.propose(state).logits
    fork = state[torch.tensor([2, 0, 0, 3, 1])]
    for _ in range(3):
        fork = process.advance(fork, torch.tensor([9, 10, 11, 12, 13]), Rng(0))
        process.propose(fork)
    assert torch.equal(process.propose(state).logits, first)
    again = process.advance(state, torch.tensor([13] * 4), Rng(0))
    fresh = process.start(PROMPTS, Rng(0))
    for step in range(2):  # both tokens are read without a proposal in between
        fresh = process.advance(fresh, again.tokens[:, step], Rng(0))
    assert torch.allclose(process.propose(again).logits, process.propose(fresh).logits, rtol=SINGLE, atol=SINGLE)


class Talkative:
    """Answers in words of the length of what it was told."""

    def reset(self, prompt: Any, **columns: Any) -> None:
        self.turns = 0

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turns += 1
        return " u v w"[: 2 * (1 + len(message) % 3)], 0.0, self.turns > 2, False, {}


def test_an_environments_words_are_read_as_they_are_scored(process: Language) -> None:
    talk = sw.conversation(process, Talkative, max_turns=3, stop=["a", "e", "i", "o", "s"])
    drawn = rollout(talk, [Request(Prompt(i, text), count=3) for i, text in enumerate(PROMPTS)], Rng(4))
    turns = [len(turns) for turns in drawn.samples.columns["turns"]]
    assert max(turns) > 1, "no environment has spoken"
    assert gap(talk, drawn.trajectories) <= SINGLE


def test_a_state_that_is_not_copied_is_caught(process: Language, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = process.propose(process.start(PROMPTS[:1], Rng(0)))
    assert honest.logits.isfinite().any()
    monkeypatch.setattr(cache, "_copied", lambda _, tensor: tensor)
    state = process.start(PROMPTS[:1], Rng(0))
    longer = [process.advance(state, torch.tensor([token]), Rng(0)) for token in (9, 10)]
    process.propose(longer[0])
    spoilt = process.propose(longer[1]).logits
    monkeypatch.undo()
    state = process.start(PROMPTS[:1], Rng(0))
    right = process.propose(process.advance(state, torch.tensor([10]), Rng(0))).logits
    assert float((spoilt - right).abs().max()) > 1e-2
