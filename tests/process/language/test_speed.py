"""What makes a language model fast changes no number: shared prompts, rooms for keys and values, rows in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from stepwell.check.tolerance import tolerance
from stepwell.process.language.process import Language
from stepwell.process.language.prompts import Packed
from stepwell.process.language.shared_forward import Line, _Fused, joint_attention, line
from stepwell.process.language.shared_prefix import SharedCache, SharedLayer, _Room
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories

Build = Callable[..., Language]
PROMPTS = ["a b c d", "e", "f g h a b c d e f g"]
SHARING = ["qwen2", "llama", "gpt2", "cohere", "granite"]


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """A fast path that disagrees warns and gives way; here it has to hold, unless a test expects the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Prompts are not shared")
        yield


def plain(process: Language) -> Language:
    process.network.shares = {"rollout": False, "score": False}
    return process


def draw(process: Language, seed: int = 0) -> Trajectories:
    return rollout(process, [Request(Prompt(i, text), 3 + i) for i, text in enumerate(PROMPTS)], Rng(seed)).trajectories


def packed(prompts: list[int], groups: list[int], own: list[int]) -> Packed:
    """Random rows: `groups` of them for `prompts` of so many tokens, each with `own` tokens read; all steps scored."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 500, (size,), generator=generator) for size in prompts]
    starts = [text for text, group in zip(texts, groups, strict=True) for _ in range(group)]
    rows = [torch.cat([s, torch.randint(5, 500, (n,), generator=generator)]) for s, n in zip(starts, own, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    row = torch.cat([torch.full((n + 1,), i) for i, n in enumerate(own)])
    step = torch.cat([torch.arange(n + 1) for n in own])
    before = torch.tensor([len(s) for s in starts])[row]
    return Packed(ids, mask, row, step, before - 1 + step, torch.zeros_like(row))


RAGGED = ([5, 9, 3], [3, 4, 1], [4, 2, 6, 1, 0, 5, 3, 2])
EVEN = ([6, 6], [2, 2], [3, 3, 3, 3])


@pytest.mark.parametrize("shape", [RAGGED, EVEN], ids=["ragged", "even"])
def test_a_line_holds_every_token_once_where_its_row_has_it(shape: Any) -> None:
    rows = packed(*shape)
    together = line(rows)
    assert together is not None
    assert len(together.ids) == sum(shape[0]) + sum(shape[2])
    assert torch.equal(together.ids[together.at], rows.ids[rows.row, rows.column])  # each step follows its own token
    assert torch.equal(together.position[together.at], rows.column)


@pytest.mark.parametrize("shape", [RAGGED, EVEN], ids=["ragged", "even"])
def test_fused_attention_has_the_values_and_gradients_of_whole_rows(shape: Any) -> None:
    rows = packed(*shape)
    together = line(rows)
    assert together is not None
    generator = torch.Generator().manual_seed(1)

    def random(heads: int) -> torch.Tensor:
        size = (len(together.ids), heads, 8)
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = random(4), random(2), random(2)
    whole = attended_row_by_row(q, k, v, together)
    weight = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    right = torch.autograd.grad((whole * weight).sum(), (q, k, v))
    for attention in (_Fused.apply, joint_attention):
        found = attention(q, k, v, together, 0.3)
        assert float((found - whole).detach().abs().max()) < 1e-12
        for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), right, strict=True):
            assert float((mine - theirs).abs().max()) < 1e-12


def attended_row_by_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, together: Line) -> torch.Tensor:
    """softmax(0.3 q k) v, one token at a time, over the token's prompt and its row up to itself."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    seen: dict[int, list[int]] = {}
    pieces = [(p, real, []) for p, real in zip(together.prompts, together.prompt_real, strict=True)]
    for row, real, origin in zip(together.rows, together.row_real, together.origin.tolist(), strict=True):
        pieces.append((row, real, together.prompts[origin][together.prompt_real[origin]].tolist()))
    for places, real, before in pieces:
        own = places[real].tolist()
        seen |= {place: [*before, *own[: i + 1]] for i, place in enumerate(own)}
    answer = []
    for place in range(len(q)):
        scores = 0.3 * torch.einsum("hd,chd->hc", q[place], k[seen[place]])
        answer.append(torch.einsum("hc,chd->hd", scores.softmax(-1), v[seen[place]]))
    return torch.stack(answer)


@pytest.mark.parametrize("architecture", SHARING)
def test_scores_and_gradients_are_those_of_rows_side_by_side(small_language: Build, architecture: str) -> None:
    fast, slow = (small_language(architecture, dtype="float64", top_p=0.9) for _ in range(2))
    rows = draw(fast)
    answers = []
    weight = torch.linspace(-1, 1, rows.mask.numel()).view(rows.mask.shape)
    for process in (fast, plain(slow)):
        scores = process.score(rows, {"entropy"})
        (scores.log_prob * weight + scores["entropy"]).sum().backward()
        answers.append((scores.log_prob.detach(), [p.grad for p in process.module.parameters() if p.grad is not None]))
    assert fast.network.shares == {"rollout": True, "score": True}
    assert float((answers[0][0] - answers[1][0]).abs().max()) < 1e-10
    assert len(answers[0][1]) == len(answers[1][1]) > 0
    single = tolerance(fast.module, torch.float32)  # the norms of all but one round to float32, also a double model's
    rounding = 1e-10 if architecture == "gpt2" else single
    for mine, theirs in zip(answers[0][1], answers[1][1], strict=True):
        assert float((mine - theirs).abs().max()) < rounding * max(float(theirs.abs().max()), 1.0)


@pytest.mark.parametrize("architecture", SHARING)
def test_shared_prompts_draw_the_same_texts(small_language: Build, architecture: str) -> None:
    fast, slow = (small_language(architecture, dtype="float64") for _ in range(2))
    first, second = draw(fast), draw(plain(slow))
    assert fast.network.shares["rollout"]
    assert torch.equal(first.action, second.action)
    assert float((first.log_prob - second.log_prob).abs().max()) < 1e-10


@pytest.mark.parametrize("architecture", ["gemma2", "bloom"])
def test_models_with_other_attention_share_nothing_and_nobody_is_warned(
    small_language: Build, architecture: str
) -> None:
    process = small_language(architecture)
    rows = draw(process)
    process.score(rows)
    assert not process.network.shares


def test_forks_of_one_state_never_write_over_each_other(small_language: Build) -> None:
    process, rng = small_language("qwen2", dtype="float64", max_new_tokens=40), Rng(0)
    group = torch.tensor([0, 0, 1, 2, 2])
    state = process.start(PROMPTS, rng)[group]
    for _ in range(3):
        state = process.advance(state, process.propose(state).sample(rng) % 20 + 8, rng)
    process.propose(state)
    forks = [state, state, state[torch.tensor([4, 4, 0])], state]
    for step in range(12):  # turn by turn, so that each goes on in the middle of the others' work
        forks = [
            process.advance(fork, (torch.arange(len(fork)) + 7 * place + step) % 20 + 8, rng)
            for place, fork in enumerate(forks)
        ]
        for fork in forks:
            process.propose(fork)
    for fork, rows in zip(forks, [group, group, group[[4, 4, 0]], group], strict=True):
        again = process.start(PROMPTS, rng)[rows]
        for step in range(fork.tokens.shape[1]):
            again = process.advance(again, fork.tokens[:, step], rng)
        gap = (process.propose(fork).logits - process.propose(again).logits).abs().max()  # read at once, many columns
        assert float(gap) < 1e-10


def test_a_room_that_anyone_may_write_in_is_caught(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: SharedLayer, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.room = self.room or _Room(keys, values, 0, 64)
        end = self.columns + keys.shape[2]
        self.room.keys[:, :, self.columns : end], self.room.values[:, :, self.columns : end] = keys, values
        self.columns = end
        return self.own()

    monkeypatch.setattr(SharedLayer, "update", careless)
    with pytest.raises(AssertionError):
        test_forks_of_one_state_never_write_over_each_other(small_language)


def test_rows_read_at_different_times_are_joined(small_language: Build) -> None:
    process, rng = small_language("qwen2", dtype="float64"), Rng(0)
    state = process.start(PROMPTS, rng)[torch.tensor([0, 0, 2])]
    state = process.advance(state, torch.tensor([8, 9, 10]), rng)
    process._reader.bring_up_to_date(state, torch.tensor([True, False, True]))  # the middle row waits
    state = process.advance(state, torch.tensor([11, 12, 13]), rng)
    fresh = process.start(PROMPTS, rng)[torch.tensor([0, 0, 2])]
    for step in range(2):
        fresh = process.advance(fresh, state.tokens[:, step], rng)
    assert float((process.propose(state).logits - process.propose(fresh).logits).abs().max()) < 1e-10
    assert isinstance(state.memory.read[-1].cache, SharedCache)


def test_a_prompt_is_read_once_for_its_group(small_language: Build) -> None:
    process = small_language("qwen2")
    rows = draw(process)
    process.score(rows)
    before = process.meter.spent
    with torch.no_grad():
        process.score(rows)
    expected = sum(len(prompt.split()) for prompt in PROMPTS) + int((rows.length - 1).sum())
    assert (process.meter.spent - before).forward == expected


@pytest.mark.parametrize("part", [SharedCache, Line])
def test_a_fast_path_that_is_wrong_gives_way_with_a_warning(
    small_language: Build, monkeypatch: pytest.MonkeyPatch, part: type
) -> None:
    honest = part.attend  # type: ignore[attr-defined]
    monkeypatch.setattr(part, "attend", lambda self, layer, q, k, v, s, cap: honest(self, layer, q, k, v, 1.3 * s, cap))
    process = small_language("qwen2")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        rows = draw(process)
        scores = process.score(rows).log_prob.detach()
    assert sum("does not agree" in str(warning.message) for warning in heard) == 1
    assert list(process.network.shares.values()).count(False) == 1
    assert float((scores - rows.log_prob).abs().max()) < tolerance(process.module)


def test_half_precision_of_autocast_is_near_and_keeps_the_fast_paths(small_language: Build) -> None:
    process = small_language("qwen2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = draw(process)
        scores = process.score(rows).log_prob
    scores.sum().backward()
    assert process.network.shares == {"rollout": True, "score": True}
    assert float((scores.detach() - rows.log_prob).abs().max()) < 0.2  # as for a model in bfloat16


def test_the_first_call_takes_the_path_of_all_others(small_language: Build) -> None:
    process = small_language("qwen2")  # or a run that is resumed in the middle would not repeat itself bit for bit
    rows = rollout(process, [Request(Prompt(0, "e"), 12)], Rng(0)).trajectories  # a prompt as short as they come
    with torch.no_grad():
        first, second = process.score(rows).log_prob, process.score(rows).log_prob
    assert process.network.shares["score"]
    assert torch.equal(first, second)
