"""Folders that hold the very model in memory: each is read back, held against it, and run on a few tokens."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError, StepwellError
from stepwell.process.language.adapters import without_adapter
from stepwell.process.language.folders import reading, weight_files
from stepwell.process.language.loading import quiet, rebuilt
from stepwell.writing import writing

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The difference of the folder's logits from the live model's, relative to the largest of them or to 1, up to which
nothing more is asked: the rounding of the format, of which a merged adapter brings some."""

DIGITS = 8
"""The last digits that every weight may be off, where a model's own sensitivity to them is measured."""


@torch.no_grad()
def save(model: Any, folder: str | os.PathLike[str], merged: bool, base_only: bool) -> None:
    """Write a model of `transformers`, adapted by `peft` or not, and hold what is read back against it.

    An adapter is `merged`, or left out (`base_only`), or written alone. Tensors are read one at a time, and only the
    layers that an adapter changes are held twice. Raises `StepwellError` where the folder is not the model, and
    `InputError` for an adapter into the folder of a whole model or the other way round: it would be read as both.
    """
    adapted = hasattr(model, "disable_adapter")
    causal = model.get_base_model() if adapted else model
    alone = adapted and not merged and not base_only
    _refuse_other_kind(Path(folder), alone)
    if alone:
        from peft.utils import get_peft_model_state_dict

        with writing(Path(folder)), quiet():
            model.save_pretrained(folder)
        weights = get_peft_model_state_dict(model)
        _compare([Path(folder) / "adapter_model.safetensors"], weights, Path(folder))
        return
    whole = without_adapter(causal, merged=not base_only) if adapted else causal
    with writing(Path(folder)), quiet():
        whole.save_pretrained(folder)
    with contextlib.ExitStack() as stack:
        if base_only and adapted:
            stack.enter_context(model.disable_adapter())
        _check(whole, causal, Path(folder))


def _refuse_other_kind(folder: Path, adapter: bool) -> None:
    """Raise `InputError` for a folder that holds a whole model where an `adapter` is to be saved, or the reverse."""
    kinds = ("a whole model", "an adapter")
    if (folder / ("config.json" if adapter else "adapter_config.json")).exists():
        raise InputError(
            f"The folder '{folder}' holds {kinds[not adapter]}, and with {kinds[adapter]} beside it would be read as "
            "both; save to another folder."
        )


def _check(whole: Any, live: Any, folder: Path) -> None:
    """Raise `StepwellError` unless a folder's weights are those of `whole`, and its model answers as the live one."""
    from transformers import AutoConfig

    weights = whole.state_dict()
    renamed = _compare(weight_files(folder), weights, folder, _owners(whole))
    with reading(f"The model saved to '{folder}'"), quiet():
        if renamed:  # families whose files have other names and shapes than their layers
            twin = type(whole).from_pretrained(folder, dtype=whole.dtype)
        else:
            config = AutoConfig.from_pretrained(folder)
            config._attn_implementation = whole.config._attn_implementation
            twin = rebuilt(whole, config, weights)
    twin = twin.to(live.device).eval()
    size = live.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 7, device=live.device)[None] % size
    own, theirs = (each(ids, use_cache=False).logits for each in (live, twin))
    same = own.eq(theirs) | (own.isnan() & theirs.isnan())
    gap = float((own - theirs).abs().masked_fill(same, 0.0).nan_to_num(torch.inf).max())
    allowed = ROUNDING[own.dtype] * max(1.0, float(own.abs().masked_fill(~own.isfinite(), 0.0).max()))
    if gap > allowed:
        allowed = max(allowed, DIGITS * _sensitivity(twin, ids, theirs))
    if gap > allowed:
        raise StepwellError(
            f"The model saved to '{folder}' is not the one in memory: their logits are {gap:.2g} apart, where "
            f"{allowed:.2g} would be rounding; do not use that folder."
        )


def _sensitivity(model: Any, ids: Tensor, logits: Tensor) -> float:
    """The largest change of the logits where each matrix's weights move by their last digit, up and down in turn.

    It is that of a rounding of the merged weights, which deep models with large weights enlarge.
    """
    moved = copy.deepcopy(model)
    for weight in moved.parameters():
        if weight.dim() > 1:
            up = torch.arange(weight.numel(), device=weight.device).view_as(weight) % 2 * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps * up)
    change = (moved(ids, use_cache=False).logits - logits).abs()
    return float(change.masked_fill(~change.isfinite(), 0.0).max())


def _owners(model: Any) -> dict[str, tuple[int, str]]:
    """The module, and the name in it, of each weight by its name: the same for those that loading makes one."""
    owners = {
        f"{place}.{name}" if place else name: (id(module), name)
        for place, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    return owners | {target: owners[source] for target, source in ties.items() if source in owners}


def _compare(
    files: list[Path],
    weights: Mapping[str, Tensor],
    folder: Path,
    owners: Mapping[str, tuple[int, str]] = MappingProxyType({}),
) -> bool:
    """Compare files with weights, a tensor at a time; True where the files' names are not those of the weights.

    Where they are, every weight has to be there; of those with the same of the `owners`, one.
    """
    from safetensors import safe_open

    renamed, found = False, set()
    for file in files:
        with reading(f"'{file}'"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name not in weights:
                    renamed = True
                elif not _same(tensors.get_tensor(name), weights[name]):
                    raise StepwellError(f"The model saved to '{folder}' is not the one in memory: '{name}' differs.")
                else:
                    found.add(name)
    there = {owners.get(name, name) for name in found}
    lost = [name for name in weights if owners.get(name, name) not in there]
    if lost and not renamed:
        raise StepwellError(f"The model saved to '{folder}' is not the one in memory: it lacks '{lost[0]}'.")
    return renamed


def _same(stored: Tensor, value: Tensor) -> bool:
    value = copy.copy(value.detach()).to(stored.device)
    return (
        stored.shape == value.shape
        and stored.dtype == value.dtype
        and bool(
            torch.equal(stored.contiguous().view(torch.uint8), value.contiguous().view(torch.uint8))
            if stored.dim()
            else torch.equal(stored, value)
        )
    )
