"""Chunk by chunk gives what plain autograd over all logits gives, and never holds them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.process.language import chunked
from stepwell.process.language.build import language
from stepwell.process.language.chunked import Head, chunked_statistics, statistics
from stepwell.process.language.process import Language
from stepwell.process.language.truncation import Truncation
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories

Build = Callable[..., Language]
NEEDS = ("entropy", "sum_of_squares", "kl")
RULES = [Truncation(), Truncation(temperature=0.7), Truncation(1.2, top_k=6, top_p=0.85, min_p=0.02)]


def problem(rule: Truncation, cap: float | None, bias: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """11 steps of 8 dimensions over 20 tokens, and a reference with a head of its own width."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    tensors = {"hidden": draw(11, 8), "weight": draw(20, 8), "bias": draw(20) if bias else None}
    tensors = {name: None if value is None else value.requires_grad_() for name, value in tensors.items()}
    action = torch.randint(0, 20, (11,), generator=generator)
    reference = (draw(11, 5), Head(draw(20, 5), cap=cap))
    upstream = {name: draw(11) for name in ("log_prob", *NEEDS)}
    return {"tensors": tensors, "action": action, "reference": reference, "upstream": upstream, "rule": rule}


def values_and_gradients(problem: dict[str, Any], cap: float | None, chunk: int | None) -> tuple[Any, list[Any]]:
    """All statistics and the gradients of a random combination; `chunk` None is plain autograd."""
    tensors, reference = problem["tensors"], problem["reference"]
    head = Head(tensors["weight"], tensors["bias"], scale=0.8, cap=cap)
    leaves = [value for value in tensors.values() if value is not None]
    arguments = (problem["action"], problem["rule"], NEEDS)
    if chunk is None:
        values = statistics(head(tensors["hidden"]), *arguments, reference[1](reference[0]))
    else:
        action, rule, needs = arguments
        values = chunked_statistics(tensors["hidden"], action, head, rule, needs, chunk, reference)
    total = sum((values[name] * upstream).sum() for name, upstream in problem["upstream"].items())
    return values, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("cap", "bias"), [(None, False), (4.0, True)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_plain_autograd(
    rule: Truncation, cap: float | None, bias: bool, chunk: int
) -> None:
    given = problem(rule, cap, bias)
    plain, plain_gradients = values_and_gradients(given, cap, None)
    values, gradients = values_and_gradients(given, cap, chunk)
    for name in plain:
        assert torch.allclose(values[name], plain[name], atol=1e-12)
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        assert float((gradient - expected).abs().max()) <= 1e-10


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = chunked._score_gradient
    monkeypatch.setattr(chunked, "_score_gradient", lambda *given: honest(*given) * 1.001)
    given = problem(RULES[0], None, False)
    _, plain = values_and_gradients(given, None, None)
    _, wrong = values_and_gradients(given, None, 4)
    assert float((wrong[0] - plain[0]).abs().max()) > 1e-4


def test_half_precision_sums_chunks_in_full() -> None:
    given = problem(RULES[1], None, True, torch.bfloat16)
    _, whole = values_and_gradients(given, None, 100)
    _, pieces = values_and_gradients(given, None, 1)
    for one, other in zip(whole, pieces, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) < 0.02


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def drawn(process: Language) -> Trajectories:
    return rollout(process, [Request(Prompt(0, "a b c"), 6), Request(Prompt(1, "d"), 6)], Rng(0)).trajectories


def learn(process: Language, rows: Trajectories, reference: Language) -> tuple[Any, dict[str, torch.Tensor]]:
    """Everything a loss may read, and its gradient on every parameter."""
    scores = process.score(rows, NEEDS, reference=reference)
    total = scores.log_prob.sum() + sum((scores[need] * 0.7).sum() for need in NEEDS)
    process.module.zero_grad()
    total.backward()
    return scores, {name: p.grad.clone() for name, p in process.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])  # gpt2's head is tied to its embedding
def test_a_models_gradient_is_that_of_its_own_logits(small_language: Build, architecture: str) -> None:
    process = small_language(architecture, dtype="float64", temperature=0.8, top_k=20, chunk=7)
    reference = process.frozen()
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.mul_(1.05)
    rows = drawn(process)
    fast, fast_gradients = learn(process, rows, reference)
    assert process.network.fast
    process.network.fast = reference.network.fast = False
    plain, plain_gradients = learn(process, rows, reference)
    assert torch.allclose(fast.log_prob, plain.log_prob, atol=1e-10)
    assert all(torch.allclose(fast[need], plain[need], atol=1e-10) for need in NEEDS)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in fast_gradients.items():
        assert float((gradient - plain_gradients[name]).abs().max()) <= 1e-10, name


def test_no_tensor_is_as_large_as_all_logits(model_folder: Any) -> None:
    process = language(model_folder("llama", vocab_size=3000), max_new_tokens=10, chunk=8, device="cpu")
    reference = process.frozen()
    rows = drawn(process)
    steps, largest = int(rows.mask.sum()), {}
    learn(process, rows, reference)  # the check of the fast path is over
    for path in ("fast", "plain"):
        process.network.fast = reference.network.fast = path == "fast"
        with Largest() as seen:
            learn(process, rows, reference)
        largest[path] = seen.elements
    assert largest["plain"] >= steps * 3000
    assert largest["fast"] <= 3000 * 32  # the embedding; a chunk of logits is a quarter of it


def test_an_unknown_head_falls_back_to_the_plain_path(small_language: Build) -> None:
    process = small_language("granite", dtype="float64")
    process.network.causal.config.logits_scaling = 0.9  # what the model does
    honest = chunked.head_of(process.network.causal)
    assert honest is not None
    rows = drawn(process)
    from stepwell.process.language import network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "head_of", lambda model: Head(honest.weight, honest.bias))  # which is not all of it
        with pytest.warns(UserWarning, match="in an unknown way"):
            scores = process.score(rows, {"hidden", "logits"})
    assert process.network.fast is False
    assert torch.allclose(scores.log_prob, rows.log_prob, atol=1e-10)
    assert scores["hidden"].shape == (*rows.mask.shape, 32)


def test_extras_are_those_of_the_distribution_drawn_from(small_language: Build) -> None:
    process = small_language("qwen2", dtype="float64", temperature=0.9, top_p=0.9)
    rows = drawn(process)
    with torch.no_grad():
        scores = process.score(rows, {"logits", "entropy", "sum_of_squares"})
    log_p, mask = scores["logits"], rows.mask
    p = log_p.exp()
    assert torch.allclose(p.sum(-1)[mask], torch.ones(int(mask.sum()), dtype=p.dtype))
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    assert torch.allclose(scores["entropy"][mask], entropy[mask])
    assert torch.allclose(scores["sum_of_squares"][mask], p.square().sum(-1)[mask])
    for need in ("entropy", "sum_of_squares"):
        assert bool((scores[need][~mask] == 0).all())
    assert torch.allclose(log_p.gather(-1, rows.action[..., None])[..., 0][mask], rows.log_prob[mask], atol=1e-10)
