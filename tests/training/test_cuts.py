"""Cuts of a minibatch: every row is in one piece, no piece is too large, and prompts' tokens count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tilted import some_rows
from torch import Tensor

from stepwell import methods
from stepwell.batch import Batch
from stepwell.check.oracles.provable import deviation
from stepwell.check.tolerance import tolerance
from stepwell.data.prompts import load_prompts
from stepwell.process.models import Models
from stepwell.rng import Rng
from stepwell.sampling.request import Request
from stepwell.sampling.rollout import rollout
from stepwell.training.update import accumulate, cut
from stepwell.trajectories import count


@dataclass
class Sized:
    """Of a process, the sizes of its rows alone."""

    sizes: Tensor

    def row_sizes(self, rows):
        return self.sizes


def drawn(seed, number=14, groups=4):
    """Rows in groups of unequal number whose prompts stand in no order, and rows' sizes from 1 to 9."""
    rng = Rng(seed)
    prompt = (rng.uniform(number) ** 2 * groups).long() * 3 + 1
    sizes = 1 + (rng.uniform(number) * 9).long()
    return some_rows(number).replace(prompt=prompt), Sized(sizes)


def filled(piece, sizes):
    """The tokens that a piece takes once it is padded."""
    return len(piece) * int(sizes[piece].max())


@pytest.mark.parametrize("tokens", [1, 8, 12, 20, 45, 130])
@pytest.mark.parametrize("coupling", ["rows", "groups", "batch"])
def test_pieces_partition_the_rows_of_unequal_groups(coupling, tokens):
    for seed in range(6):
        rows, process = drawn(seed)
        whole = [torch.arange(len(rows))]
        groups = [(rows.prompt == prompt).nonzero()[:, 0] for prompt in rows.prompt.unique()]
        units = {"rows": [], "groups": groups, "batch": whole}[coupling]
        pieces = cut(process, rows, coupling, tokens)
        fits = all(filled(unit, process.sizes) <= tokens for unit in units)
        assert (pieces is not None) == fits, "no cut where a unit that belongs together is too large, else one"
        if pieces is None:
            continue
        assert sorted(torch.cat(pieces).tolist()) == list(range(len(rows)))
        for piece in pieces:
            assert filled(piece, process.sizes) <= tokens or (coupling == "rows" and len(piece) == 1)
            held = set(piece.tolist())
            assert all(held >= set(unit.tolist()) or held.isdisjoint(unit.tolist()) for unit in units)


@pytest.mark.parametrize("coupling", ["rows", "groups"])
def test_no_two_pieces_in_a_row_would_have_fitted_into_one(coupling):
    for seed in range(6):
        rows, process = drawn(seed)
        pieces = cut(process, rows, coupling, 40)
        for one, other in zip(pieces or [], (pieces or [])[1:], strict=False):
            begun = other if coupling == "groups" else other[:1]  # rows are added one by one, groups as a whole
            begun = begun[rows.prompt[begun] == rows.prompt[begun[0]]]
            assert filled(torch.cat([one, begun]), process.sizes) > 40


@pytest.mark.parametrize("coupling", ["rows", "groups", "batch"])
def test_without_a_limit_all_rows_are_one_piece(coupling):
    rows, process = drawn(0)
    (piece,) = cut(process, rows, coupling, None)
    assert piece.tolist() == list(range(len(rows)))


def test_prompts_count_where_a_language_model_is_cut(small_language):
    """Prompts of 1 to 8 words stand in columns of equal width, and no forward holds more than the limit."""
    process = small_language(max_new_tokens=5, dtype="float64")
    prompts = load_prompts([{"prompt": text} for text in ("a b c d e f g h", "i", "j k l")])
    rows = rollout(process, [Request(prompt, 4) for prompt in prompts], Rng(3)).trajectories
    rows = rows.replace(reward=Rng(4).normal(len(rows), dtype=torch.float64))
    own = (rows.action.shape[1], rows.condition["prompt_mask"].shape[1])
    assert process.row_sizes(rows).tolist() == [
        int(words) + int(length)
        for words, length in zip(rows.condition["prompt_mask"].sum(1), rows.length, strict=True)
    ]
    objective = methods.get("grpo").recipe().whole
    counts = count(rows, process.horizon)
    targets = objective.plan(Batch(rows, counts))
    sizes: list[int] = []
    embeddings = process.network.causal.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, given, result: sizes.append(given[0].numel()))

    def gradient(tokens):
        process.module.zero_grad()
        sizes.clear()
        accumulate(Models(process), objective, Batch(rows, counts), targets, tokens)
        return torch.cat([p.grad.reshape(-1) for p in process.module.parameters() if p.grad is not None])

    whole = gradient(None)
    assert max(sizes) > 2 * sum(own), "all rows are read together"
    for tokens in (13, 30):
        assert deviation(gradient(tokens), whole) < tolerance(process.module, torch.float32)  # norms are in float32
        assert max(sizes) <= tokens
    hook.remove()
