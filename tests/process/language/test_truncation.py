"""The truncated distribution is that of transformers' own warpers, in transformers' own order."""

from __future__ import annotations

import pytest
import torch

from stepwell.check.tolerance import rounding
from stepwell.errors import InputError
from stepwell.process.language.truncation import Truncation


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.8, 0.05)]
)
def test_the_distribution_is_that_of_the_warpers_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from transformers import GenerationConfig, GenerationMixin

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = logits[:, 8]  # ties
    settings = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    class Bare(GenerationMixin):
        """Only what is needed to ask transformers for its own list of warpers, in its own order."""

        config = type("Config", (), {"is_encoder_decoder": False})()

    settings.eos_token_id = settings._eos_token_tensor = None
    warpers = Bare._get_logits_processor(Bare(), settings, prefix_allowed_tokens_fn=None, logits_processor=[])
    expected = warpers(torch.zeros(50, 1, dtype=torch.long), logits.clone()).log_softmax(-1)
    log_probs = Truncation(temperature, top_k, top_p, min_p).log_probs(logits)
    assert torch.equal(log_probs == -torch.inf, expected == -torch.inf)
    assert torch.allclose(log_probs, expected, atol=rounding(torch.float32, 40))


def test_the_action_is_always_kept() -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    worst = logits.argmin(-1)
    rule = Truncation(top_k=3, top_p=0.5, min_p=0.3)
    assert bool((rule.log_probs(logits).gather(1, worst[:, None]) == -torch.inf).all())
    kept = rule.log_probs(logits, worst)
    assert bool(kept.gather(1, worst[:, None]).isfinite().all())
    best = logits.argmax(-1)
    assert torch.equal(rule.log_probs(logits, best), rule.log_probs(logits))  # an action that was in changes nothing


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} must be .*, got"):
        Truncation(**options)  # type: ignore[arg-type]
