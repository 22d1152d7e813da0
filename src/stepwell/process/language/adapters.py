"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) of `peft`, added to a model and merged into weights of their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepwell.errors import InputError
from stepwell.process.language.folders import first_sentence
from stepwell.process.language.loading import fixed_start, rebuilt

WRAPPERS = (".base_layer", ".original_module", ".token_adapter", ".modules_to_save.default")
"""The names that peft puts between a layer and its weights."""


def with_adapter(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The model with a LoRA adapter of `peft.LoraConfig(**options)`; only the adapter learns.

    Without targets, a kind of model for which peft has no default is adapted in all its linear layers. Layers that take
    no part in reading a text, such as those for images, and those whose weights are read past them stay as they are;
    to name such a layer as a target is an `InputError`. The random start is the same in every run and leaves torch's
    global generator as it was.
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
    if not any(chosen.get(name) for name in ("target_modules", "target_parameters")):
        chosen["target_modules"] = DEFAULTS.get(config.model_type) or "all-linear"
    try:
        idle = idle_layers(model)
        _refuse_idle(chosen.get("target_modules"), idle, model)
        chosen["exclude_modules"] = _with_more(chosen.get("exclude_modules"), idle)
        with fixed_start():
            return get_peft_model(model, LoraConfig(**chosen))  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:  # peft raises errors of many kinds
        raise InputError(f"The LoRA options {dict(options)} do not fit this model: {first_sentence(error)}") from error


@torch.no_grad()
def idle_layers(model: nn.Module) -> list[str]:
    """The linear layers in which an adapter would do nothing, or another thing than when it is merged, by their names.

    A text of a few tokens is read. A layer takes part if it is called and gives its input times its weight, or if one
    does that has the same name but for numbers: few of many experts are asked. Layers that peft adapts in no model of
    this kind are idle too.
    """
    part: dict[str, bool] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | _conv1d())}

    def note(layer: nn.Module, given: tuple[Any, ...], output: Any, name: str) -> None:
        part[_row(name)] = part.get(_row(name), True) and bool(given) and _is_product(layer, given[0], output)

    hooks = [layer.register_forward_hook(partial(note, name=name)) for name, layer in layers.items()]
    learning = model.training
    try:
        embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(1, 5, device=embeddings.device)[None] % len(embeddings)
        model.eval()(ids, use_cache=False)
    finally:
        model.train(learning)
        for hook in hooks:
            hook.remove()
    adaptable = {last: _is_adaptable(model, last) for last in {name.rpartition(".")[2] for name in layers}}
    return [name for name in layers if not part.get(_row(name)) or not adaptable[name.rpartition(".")[2]]]


def _row(name: str) -> str:
    """The name that a layer shares with its like in all blocks and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _conv1d() -> type[nn.Module]:
    """GPT-2's linear layer, whose weight is turned."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind


def _is_product(layer: Any, given: Tensor, output: Any) -> bool:
    """True where a layer's output is its input times its weight, and its bias on top, in half of the digits.

    Rounding is far below that, and another product far above.
    """
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    if not isinstance(output, Tensor) or given.shape[-1] != weight.shape[1]:
        return False
    product = functional.linear(given.to(weight.dtype), weight, layer.bias)
    gap = (output - product).abs().max() if output.shape == product.shape else torch.inf
    return bool(gap <= torch.finfo(weight.dtype).eps ** 0.5 * product.abs().max())


def _is_adaptable(model: nn.Module, last: str) -> bool:
    """True where peft adapts layers of such a name in models of this kind: those of Mamba read some past the layer."""
    from peft import LoraConfig, inject_adapter_in_model

    trial = nn.Module()
    trial.config = model.config
    try:
        with fixed_start():
            trial.add_module(last, nn.Linear(1, 1))
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[last]), trial)
    except ValueError:
        return False
    return True


def _refuse_idle(targets: Any, idle: Sequence[str], model: nn.Module) -> None:
    """Raise `InputError` for a target by name that no layer has but idle ones."""
    if targets is None or isinstance(targets, str):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        meant = {name for name in names if name == target or name.endswith(f".{target}")}
        if meant and meant <= set(idle):
            raise InputError(
                f"The LoRA target '{target}' is no linear layer that a {type(model).__name__} reads texts through, so "
                "that an adapter of it would learn nothing, or be lost on merging; leave it out."
            )


def _with_more(excluded: Any, idle: Sequence[str]) -> Any:
    """The modules that a user excludes, by names or a pattern, and the idle ones."""
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *map(re.escape, idle)])
    return [*(excluded or ()), *idle] or None


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

    Layers without an adapter are shared with `causal`, which is afterwards as it was, bit for bit. Once an adapter has
    made two weights different that are tied, such as a head and embeddings, no weights are tied any more: they are so
    all or none, by configuration.
    """
    weights = _base_weights(causal)
    if merged:
        weights |= _merged_weights(causal)
    config = copy.deepcopy(causal.config)
    tied = [
        (plain_name(target), plain_name(source))
        for target, source in causal.get_expanded_tied_weights_keys(all_submodels=True).items()
        if plain_name(target) in weights and plain_name(source) in weights
    ]
    if any(not _equal(weights[target], weights[source]) for target, source in tied):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False  # which is of all of them
        for target, source in tied:
            if weights[target] is weights[source]:
                weights[target] = weights[source].detach().clone()
    return rebuilt(causal, config, weights)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


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
