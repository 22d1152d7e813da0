"""Special tokens in texts, stops and tool markers; and ids that no token belongs to, which are never drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chatty import ASK, chatty, likely, shown

from stepwell import check
from stepwell.check.tolerance import tolerance
from stepwell.objective.distillation import generalised_divergence
from stepwell.process.conversation.build import conversation
from stepwell.process.language.build import language
from stepwell.process.language.chunked import Head, chunked_statistics, statistics
from stepwell.process.language.process import Language
from stepwell.process.language.truncation import Truncation
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout

MARKERS = ("<think>", "</think>", "[TOOL_CALLS]")


def draw(process: Any, prompt: Any = ASK, count: int = 6) -> Any:
    return rollout(process, [Request(Prompt(0, prompt), count)], Rng(0))


def marked(keep: bool | None, **options: Any) -> Language:
    process = chatty("chatml", more=MARKERS, keep_special_tokens=keep, max_new_tokens=24, **options)
    likely(process, "<think>", "</think>", "x", "<|im_end|>", "<pad>")
    return process


# in texts


@pytest.mark.parametrize("prompt", [ASK, "Say blue."], ids=["chat", "text"])
@pytest.mark.parametrize(("keep", "kept"), [(None, False), (False, False), (True, True)])
def test_single_texts_show_special_tokens_if_asked(keep: bool | None, kept: bool, prompt: Any) -> None:
    process = marked(keep)
    samples = draw(process, prompt).samples
    texts = [value if isinstance(value, str) else value[-1]["content"] for value in samples.values]
    for text, ids in zip(texts, samples.columns["completion_ids"], strict=True):
        whole = shown(process, ids).replace("<|im_end|>", "").replace("<pad>", "")
        assert text == (whole if kept else whole.replace("<think>", "").replace("</think>", ""))
    assert any("think" in text for text in texts) == kept


def test_a_demonstration_with_special_tokens_is_shown_as_it_is() -> None:
    said = [{"role": "assistant", "content": "<think>a</think>b"}]
    request = [Request(Prompt(0, ASK), 1, start=Completion(said))]
    assert rollout(marked(True), request, Rng(0)).samples.values == [said]
    assert rollout(marked(None), request, Rng(0)).samples.values[0][0]["content"] == "ab"


def test_an_end_token_that_is_a_word_stays_in_the_text() -> None:
    process = chatty("chatml", eos=["."], keep_special_tokens=True)
    likely(process, "a", ".")
    assert all(value[0]["content"].endswith(".") for value in draw(process).samples.values)


class Hears:
    """Remembers what it is told."""

    heard: list[str] = []  # noqa: RUF012

    def reset(self, prompt: Any) -> None:
        return None

    def step(self, message: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(message)
        return "go on", 0.0, False, False, {}


@pytest.mark.parametrize(("keep", "kept"), [(None, True), (True, True), (False, False)])
def test_environments_see_tool_markers_unless_told_otherwise(keep: bool | None, kept: bool) -> None:
    Hears.heard = []
    drawn = draw(conversation(marked(keep), Hears, max_turns=2))
    assert any("<think>" in message for message in Hears.heard) == kept
    assert not any("<|im_end|>" in message or "<pad>" in message for message in Hears.heard)
    spoken = [m["content"] for value in drawn.samples.values for m in value if m["role"] == "assistant"]
    assert any("<think>" in message for message in spoken) == kept
    assert [turn["message"] for turns in drawn.samples.columns["turns"] for turn in turns] != []


@pytest.mark.parametrize("keep", [None, False])
def test_a_special_token_stops_a_turn(keep: bool | None) -> None:
    process = marked(keep)
    likely(process, "<think>", "x", "</think>")
    drawn = draw(conversation(process, Hears, max_turns=2, stop="</think>"))
    end = process.tokenizer.convert_tokens_to_ids("</think>")
    turns = drawn.samples.columns["turns"]
    assert sum(map(len, turns)) > 6
    for row, ids in zip(turns, drawn.samples.columns["completion_ids"], strict=True):
        assert ids.count(end) == len(row) or len(row) == 2
        for turn in row:
            assert turn["message"].endswith("</think>") == (keep is None)


# ids without a token


def padded(extra: int = 40, **options: Any) -> Language:
    """A model with more ids than its tokenizer has tokens; the ones beyond would be drawn most of the time."""
    words = len(chatty("chatml").tokenizer)
    process = chatty("chatml", size=words + extra, **options)
    head = process.network.causal.lm_head
    with torch.no_grad():
        head.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
        head.weight[words:] += 0.5
    return process


RULES = [{}, {"temperature": 0.7}, {"top_k": 6, "top_p": 0.9, "min_p": 0.01}, {"top_k": 10**6}]


@pytest.mark.parametrize("options", RULES, ids=str)
def test_ids_without_a_token_are_never_drawn_and_scores_agree(options: dict[str, Any]) -> None:
    process = padded(**options, dtype="float64")
    words = len(process.tokenizer)
    drawn = draw(process, count=8)
    rows = drawn.trajectories
    assert int(rows.action.max()) < words
    scores = process.score(rows, {"logits", "entropy"})
    assert float((scores.log_prob - rows.log_prob).detach().abs().max()) < tolerance(process.module)
    assert bool((scores["logits"][rows.mask][:, words:] == -torch.inf).all())
    assert torch.allclose(scores["logits"][rows.mask].exp().sum(-1), torch.ones(1, dtype=torch.float64))
    loss = (scores.log_prob + scores["entropy"]).sum()
    loss.backward()
    gradients = [p.grad for p in process.module.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    head = process.network.causal.lm_head.weight.grad
    assert not head[words:].any()
    assert head[:words].any()


def test_the_laws_hold_with_ids_that_have_no_token() -> None:
    report = check.process(padded(max_new_tokens=6, positions=64), ["a b", "c"])
    assert set(report.skipped) == {"exact law"}


@pytest.mark.parametrize("needs", [("kl",), ("kl", "entropy", "sum_of_squares")], ids=["kl", "all"])
def test_a_chunked_gradient_is_the_plain_one_without_some_ids(needs: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, other = draw(7, 5), draw(11, 5), draw(11, 5)
    action, absent = torch.arange(7), torch.arange(8, 11)
    rule = Truncation(0.8, top_k=5, absent=absent)
    upstream = draw(7)
    found = []
    for chunked in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            values = chunked_statistics(h, action, Head(w), rule, needs, 3, (hidden, Head(other)))
        else:
            values = statistics(Head(w)(h), action, rule, needs, Head(other)(hidden))
        sum((values[name] * upstream).sum() for name in ("log_prob", *needs)).backward()
        found.append([*(values[name].detach() for name in ("log_prob", *needs)), h.grad, w.grad])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    assert all(bool(value.isfinite().all()) for value in found[0])
    present = Truncation(0.8, top_k=5)  # the same as a vocabulary that never had them
    alone = statistics((hidden @ weight.T)[:, :8], action, present, needs, (hidden @ other.T)[:, :8])
    assert all(torch.allclose(alone[name], value) for name, value in zip(("log_prob", *needs), found[0], strict=False))


def test_a_reference_and_a_teacher_have_the_same_ids() -> None:
    process = padded(max_new_tokens=5, dtype="float64")
    reference, rows = process.frozen(), draw(process).trajectories
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.mul_(1.1)
    kl = process.score(rows, {"kl"}, reference=reference)["kl"]
    logits = [each.score(rows, {"logits"})["logits"][rows.mask] for each in (process, reference)]
    p, q = (each[:, : len(process.tokenizer)] for each in logits)
    assert torch.allclose(kl[rows.mask], (p.exp() * (p - q)).sum(-1), atol=1e-12)
    kl.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in process.module.parameters())
    impossible = torch.tensor([0.0, -torch.inf])
    for beta in (0.0, 0.5, 1.0):
        student = torch.tensor([0.3, 0.0], requires_grad=True)
        log_p = student.masked_fill(impossible == -torch.inf, -torch.inf).log_softmax(-1)
        divergence = generalised_divergence(log_p, impossible, beta)
        divergence.backward()
        assert float(divergence.detach()) == 0.0
        assert student.grad.isfinite().all()


def test_a_vocabulary_with_a_token_for_every_id_has_no_rule() -> None:
    assert chatty("chatml").truncation.absent is None
    process = padded(extra=3)
    words = len(process.tokenizer)
    assert process.truncation.absent.tolist() == [words, words + 1, words + 2]


def test_holes_have_no_token_and_declared_ends_do() -> None:
    process = padded(extra=4)
    words = len(process.tokenizer)
    process.network.causal.generation_config.eos_token_id = [words + 1]  # an end that the tokenizer does not know
    again = language(process.network.causal, process.tokenizer)
    assert again.truncation.absent.tolist() == [words, words + 2, words + 3]
