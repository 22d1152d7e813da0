"""Score the rows of a group with one reading of their prompt: all tokens in one line, no padding, exact gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwell.process.language.prompts import Packed

WORTH = 0.9
"""The line is used if it has at most this share of the tokens that rows side by side have, padding included."""


@dataclass(frozen=True)
class Line:
    """B prompts and after them R continuations, each of one of the prompts, in one line of T tokens.

    `ids`, `position` (T,). `prompts` (B, P) and `rows` (R, C) are places in the line, 0 beyond an end; `prompt_real`
    and `row_real` are True at those that are places. `origin` (R,) is the prompt of each row; `arranged` (B, G) lists
    the rows of each prompt, as far as `filled`, and `slot` (R,) is each row's place in it, flattened. `at` (M,) are
    the places whose hidden states predict the steps.
    """

    ids: Tensor
    position: Tensor
    prompts: Tensor
    prompt_real: Tensor
    rows: Tensor
    row_real: Tensor
    origin: Tensor
    arranged: Tensor
    filled: Tensor
    slot: Tensor
    at: Tensor

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, cap: float | None
    ) -> Tensor:
        """(1, T, heads, D): every token sees its row up to itself and the row's whole prompt, from (1, heads, T, D)."""
        if cap is not None:
            raise NotImplementedError("Scores with a soft cap have no fused attention.")
        device, kind = query.device.type, value.dtype
        if torch.is_autocast_enabled(device):  # it would cast the inputs of torch's own attention
            kind = torch.get_autocast_dtype(device)
        q, k, v = (x[0].transpose(0, 1).to(kind) for x in (query, key, value))
        attention: Any = _Fused.apply if device == "cpu" else joint_attention
        return attention(q, k, v, self, scaling)[None]


def line(packed: Packed, worth: float = WORTH) -> Line | None:
    """The rows of `packed` that have steps, equal prompts once; None if more than `worth` of the tokens are left."""
    count, width = packed.ids.shape
    if len(packed.row) == 0 or count < 2:
        return None
    before = torch.zeros(count, dtype=torch.long, device=packed.ids.device)
    before[packed.row] = packed.column - packed.step + 1  # (N,) tokens of the prompt; 0 for rows without a step
    whole, prompt_sizes = packed.mask.sum(1).tolist(), before.tolist()
    places: dict[tuple[int, ...], int] = {}
    origin: list[int] = []
    kept = [row for row, size in enumerate(prompt_sizes) if size]
    ids = packed.ids.tolist()
    for row in kept:
        origin.append(places.setdefault(tuple(ids[row][: prompt_sizes[row]]), len(places)))
    own = [whole[row] - prompt_sizes[row] for row in kept]
    if sum(map(len, places)) + sum(own) > worth * count * width or not any(own):
        return None
    device = packed.ids.device
    prompt_lengths, own_lengths = torch.tensor([len(p) for p in places]), torch.tensor(own)
    prompts, prompt_real = _places(prompt_lengths, 0)
    rows, row_real = _places(own_lengths, int(prompt_lengths.sum()))
    tokens = [token for prompt in places for token in prompt]
    start = torch.tensor([prompt_sizes[row] for row in kept])
    for row, length in zip(kept, own, strict=True):
        tokens += ids[row][prompt_sizes[row] : prompt_sizes[row] + length]
    position = torch.cat(
        [torch.arange(prompts.shape[1]).expand(prompts.shape)[prompt_real],
         (start[:, None] + torch.arange(rows.shape[1]))[row_real]]
    )  # fmt: skip
    group = torch.tensor(origin)
    in_group = torch.bincount(group, minlength=len(places))
    arranged = torch.zeros(len(places), int(in_group.max()), dtype=torch.long)
    order = group.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - (in_group.cumsum(0) - in_group)[group[order]]
    arranged[group, place] = torch.arange(len(group))
    filled = torch.arange(arranged.shape[1]) < in_group[:, None]
    number = torch.full((count,), -1)
    number[kept] = torch.arange(len(kept))
    of_step, step = number[packed.row.cpu()], packed.step.cpu()
    last = prompts.gather(1, (prompt_lengths - 1)[:, None])[:, 0][group[of_step]]
    at = torch.where(step == 0, last, rows[of_step, (step - 1).clamp(min=0)])
    read = (torch.tensor(tokens), position, prompts, prompt_real, rows, row_real)
    parts = (*read, group, arranged, filled, group * arranged.shape[1] + place, at)
    return Line(*(part.to(device) for part in parts))


def _places(lengths: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The places (K, longest) of pieces (K,) that follow one another from `first` on, and a mask of the real ones."""
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    return ((lengths.cumsum(0) - lengths + first)[:, None] + columns).masked_fill(~real, 0), real


class _Fused(torch.autograd.Function):
    """Prompts to themselves, rows to themselves, and all rows of a prompt to it at once, by the fused kernels.

    A row's attention is o = a o1 + (1 - a) o2, by the sums of exp(score) of both parts. The kernels' backward pass
    needs only o and the whole log-sum-exp, not the parts' own: with p = exp(s - lse), ds = p (dp - do . o).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, line: Line, scaling: float) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        heads, kv_heads = query.shape[1], key.shape[1]
        q, k, v = (_padded(x, line.prompts, heads) for x in (query, key, value))
        prompt_seen, prompt_sum = flash(q, k, v, 0.0, True, scale=scaling)
        q, k, v = (_padded(x, line.rows, heads) for x in (query, key, value))
        seen, total = flash(q, k, v, 0.0, True, scale=scaling)
        k, v = (_padded(x, line.prompts, kv_heads) for x in (key, value))
        mask = _key_mask(line, query.dtype)
        other, other_sum = flash(_spread(q, line, kv_heads), k, v, 0.0, False, attn_mask=mask, scale=scaling)
        other, other_sum = _gathered(other, line), _gathered(other_sum[..., None], line)[..., 0]
        portion = torch.sigmoid(other_sum - total)[..., None].to(seen.dtype)
        seen, total = seen + portion * (other - seen), torch.logaddexp(total, other_sum)
        ctx.line, ctx.scaling = line, scaling
        ctx.save_for_backward(query, key, value, prompt_seen, prompt_sum, seen, total)
        return torch.cat([prompt_seen.transpose(1, 2)[line.prompt_real], seen.transpose(1, 2)[line.row_real]])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        query, key, value, prompt_seen, prompt_sum, seen, total = ctx.saved_tensors
        line, scaling = ctx.line, ctx.scaling
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        heads, kv_heads = query.shape[1], key.shape[1]
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        for places, real, o, lse in (
            (line.prompts, line.prompt_real, prompt_seen, prompt_sum),
            (line.rows, line.row_real, seen, total),
        ):
            d, q, k, v = (_padded(x, places, heads) for x in (slope, query, key, value))
            d = d * real[:, None, :, None]
            for gradient, part in zip(gradients, flash(d, q, k, v, o, lse, 0.0, True, scale=scaling), strict=True):
                _add(gradient, part, places, real)
        k, v = (_padded(x, line.prompts, kv_heads) for x in (key, value))
        reading = d, q, seen, total[..., None]  # of the rows, which came last
        d, q, o, sums = (_spread(x, line, kv_heads) for x in reading)
        mask = _key_mask(line, query.dtype)
        to_query, to_key, to_value = flash(
            _emptied(d, line), q, k, v, o, sums[..., 0], 0.0, False, attn_mask=mask, scale=scaling
        )
        _add(gradients[0], _gathered(to_query, line), line.rows, line.row_real)
        _add(gradients[1], to_key, line.prompts, line.prompt_real)
        _add(gradients[2], to_value, line.prompts, line.prompt_real)
        return *gradients, None, None


def _padded(values: Tensor, places: Tensor, heads: int) -> Tensor:
    """(K, heads, C, D) the values (T, h, D) at places (K, C), each of the h heads repeated."""
    return values[places].transpose(1, 2).repeat_interleave(heads // values.shape[1], 1)


def _spread(values: Tensor, line: Line, kv_heads: int) -> Tensor:
    """(B, kv_heads, G * heads / kv_heads * C, D) the values (R, heads, C, D) of each prompt's rows, side by side."""
    return values.unflatten(1, (kv_heads, -1))[line.arranged].transpose(1, 2).flatten(2, 4)


def _gathered(values: Tensor, line: Line) -> Tensor:
    """(R, heads, C, D) from `_spread`'s arrangement."""
    group, columns = line.arranged.shape[1], line.rows.shape[1]
    return values.unflatten(2, (group, -1, columns)).transpose(1, 2).flatten(0, 1)[line.slot].flatten(1, 2)


def _emptied(values: Tensor, line: Line) -> Tensor:
    """`_spread`'s arrangement with zeros in the places that have no row."""
    parts = values.unflatten(2, (line.arranged.shape[1], -1))
    return (parts * line.filled[:, None, :, None, None]).flatten(2, 3)


def _key_mask(line: Line, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, 1, P) the summand of the scores: minus infinity beyond the end of a prompt."""
    if bool(line.prompt_real.all()):
        return None
    return torch.zeros(line.prompts.shape, dtype=dtype).masked_fill(~line.prompt_real, -torch.inf)[:, None, None]


def _add(gradient: Tensor, part: Tensor, places: Tensor, real: Tensor) -> None:
    """Add (K, heads, C, D) to the (T, h, D) it was taken from; heads that were repeated are summed."""
    part = part.unflatten(1, (gradient.shape[1], -1)).sum(2).transpose(1, 2)
    gradient.index_add_(0, places[real], part[real])


def joint_attention(query: Tensor, key: Tensor, value: Tensor, line: Line, scaling: float) -> Tensor:
    """The same (T, heads, D) with each row's own copy of its prompt's keys and values, for any device."""
    heads = query.shape[1]
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (_padded(x, line.prompts, heads) for x in (query, key, value))
    prompts = attention(q, k, v, is_causal=True, scale=scaling)
    q, own_k, own_v = (_padded(x, line.rows, heads) for x in (query, key, value))
    keys, values = torch.cat([k[line.origin], own_k], 2), torch.cat([v[line.origin], own_v], 2)
    columns = torch.arange(line.rows.shape[1], device=query.device)
    earlier = (columns <= columns[:, None]).expand(len(line.rows), -1, -1)
    whole = line.prompt_real[line.origin, None].expand(-1, len(columns), -1)
    seen = attention(q, keys, values, attn_mask=torch.cat([whole, earlier], 2)[:, None], scale=scaling)
    return torch.cat([prompts.transpose(1, 2)[line.prompt_real], seen.transpose(1, 2)[line.row_real]])
