"""Sentences of sampled tokens, texts as tokens, and a table's hidden states."""

from __future__ import annotations

import pytest
import torch

from stepwell.errors import InputError
from stepwell.process.exact.table import markov
from stepwell.process.language.segments import segments, sentence_ends
from stepwell.rng import Rng
from stepwell.sampling.request import Completion, Prompt, Request
from stepwell.sampling.rollout import rollout


def test_a_segment_holds_the_token_that_ends_it():
    action = torch.tensor([[3, 1, 2, 1, 1, 4], [1, 2, 2, 2, 2, 2]])
    assert segments(action, torch.tensor([1])).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]
    assert segments(action, torch.tensor([], dtype=torch.long)).tolist() == [[0] * 6] * 2


def test_a_sentence_ends_with_its_mark():
    """Whatever stands before it, and with blanks behind."""
    words = {0: "one", 1: "two.", 2: ". ", 3: "?!", 4: "\n\n", 5: "3.1", 6: " ", 7: "。"}
    ends = sentence_ends(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), lambda ids: words[ids[0]])
    assert ends.tolist() == [1, 2, 3, 4, 7]


def test_a_languages_sentences_are_those_of_its_tokens(small_language):
    model = small_language()
    drawn = rollout(model, [Request(Prompt(0, "a b"), 1, start=Completion("c d . e f . g"))], Rng(0))
    assert model.segments(drawn.trajectories).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def test_a_completion_is_its_tokens_and_the_end(small_language):
    model = small_language()
    drawn = rollout(model, [Request(Prompt(0, "a b"), 1, start=Completion("c d"), source=1)], Rng(0))
    rows = drawn.trajectories
    assert drawn.samples.values == ["c d"]
    assert int(rows.action[0, -1]) in model.ends.tolist()
    assert rows.truncated.tolist() == [False]
    assert rows.mask.all()
    scored = model.score(rows).log_prob
    assert bool(scored.isfinite().all())
    assert bool((scored < 0).all())


def test_a_completion_that_is_too_long_or_no_text_is_refused(small_language):
    model = small_language()
    for given, message in (
        ("a " * 30, "must have at most max_new_tokens=10 tokens, got 31"),
        (7, "must be a text or a"),
    ):
        with pytest.raises(InputError, match=message):
            rollout(model, [Request(Prompt(0, "a"), 1, start=Completion(given))], Rng(0))


def test_a_chats_completion_is_the_assistants_message(small_language):
    model = small_language(chat=True)
    said = [{"role": "assistant", "content": "c d"}]
    prompt = Prompt(0, [{"role": "user", "content": "a"}])
    drawn = rollout(model, [Request(prompt, 1, start=Completion(said))], Rng(0))
    assert drawn.samples.values == [said]


def test_a_tables_logits_are_linear_in_its_hidden_states():
    process = markov(symbols=3, length=3, prompts=2, seed=4)
    rows = process.trajectories(1)
    scores = process.score(rows, {"hidden", "logits"})
    log_p = (scores["hidden"] @ process.logits.reshape(-1, 3)).log_softmax(-1)
    assert torch.allclose(log_p[rows.mask], scores["logits"][rows.mask], rtol=0, atol=1e-14)
