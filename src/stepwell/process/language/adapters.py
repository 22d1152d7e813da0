"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) of `peft`, added to a model and merged into weights of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.errors import InputError
from stepwell.process.language.folders import first_sentence
from stepwell.process.language.loading import fixed_start, rebuilt

WRAPPERS = (".base_layer", ".original_module", ".token_adapter", ".modules_to_save.default")
"""The names that peft puts between a layer and its weights."""


def with_adapter(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model with a LoRA adapter of `peft.LoraConfig(**options)`; only the adapter learns.

    Without targets, a kind of model for which peft has no default is adapted in all its linear layers. The random start
    is the same in every run and leaves torch's global generator as it was.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    except ImportError as error:
        raise InputError("LoRA needs peft, which is not installed: pip install 'stepwell[lora]'.") from error
    chosen = {"task_type": "CAUSAL_LM", **options}
    if chosen.get("target_modules") in (["all-linear"], ("all-linear",)):
        chosen["target_modules"] = "all-linear"
    config: Any = model.config
    own = ("target_modules", "target_parameters")
    if not any(chosen.get(name) for name in own) and config.model_type not in DEFAULTS:
        chosen["target_modules"] = "all-linear"
    try:
        with fixed_start():
            return get_peft_model(model, LoraConfig(**chosen))  # type: ignore[arg-type]
    except Exception as error:  # peft raises errors of many kinds
        raise InputError(f"The LoRA options {dict(options)} do not fit this model: {first_sentence(error)}") from error


def plain_name(name: str) -> str:
    """The name that a weight of an adapted model has without the adapter.

    Example:
        >>> plain_name("model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@torch.no_grad()
def without_adapter(causal: Any, merged: bool) -> Any:
    """A model of the class of `causal` without its adapter, which is `merged` into its weights or left out.

    Layers without an adapter are shared with `causal`, which is afterwards as it was, bit for bit. A head that is tied
    to embeddings is its own, by configuration, once an adapter has made the two different.
    """
    weights = _base_weights(causal)
    if merged:
        weights |= _merged_weights(causal)
    config = copy.deepcopy(causal.config)
    for target, source in causal.get_expanded_tied_weights_keys(all_submodels=True).items():
        first, second = weights.get(plain_name(source)), weights.get(plain_name(target))
        if first is not None and second is not None and first is not second and not torch.equal(first, second):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return rebuilt(causal, config, weights)


def _base_weights(causal: nn.Module) -> dict[str, Tensor]:
    """The weights beneath the adapter, by the names that they have without it."""
    return {
        plain_name(name): value
        for name, value in causal.state_dict(keep_vars=True).items()
        if "modules_to_save" not in name
    }


def _merged_weights(causal: nn.Module) -> dict[str, Tensor]:
    """The weights that the adapter changes or replaces, with it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    merged: dict[str, Tensor] = {}
    for name, module in causal.named_modules(remove_duplicate=False):
        if isinstance(module, ModulesToSaveWrapper):
            copied = module.modules_to_save[module.active_adapters[0]]
            merged |= {f"{plain_name(name)}.{key}": value for key, value in copied.state_dict(keep_vars=True).items()}
        elif isinstance(module, BaseTunerLayer):
            merged |= {f"{plain_name(name)}.{key}": value for key, value in _merged_layer(module).items()}
    return merged


def _merged_layer(layer: Any) -> dict[str, Tensor]:
    """The weights that an adapted layer has once merged; its own are put back to the last bit."""
    base = layer.get_base_layer()
    before = {name: (parameter.data, parameter.data.clone()) for name, parameter in base.named_parameters()}
    merged: dict[str, Tensor] = {}
    try:
        layer.merge()
        for name, parameter in base.named_parameters():
            if not torch.equal(parameter.data, before[name][1]):
                merged[name] = parameter.data.clone()
    finally:
        for name, parameter in base.named_parameters():
            parameter.data, value = before[name]
            parameter.data.copy_(value)
        layer.merged_adapters.clear()
    return merged
