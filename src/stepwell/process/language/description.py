"""A model of `transformers` and its adapter in values for JSON: all that decides its numbers besides its parameters."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import nn

NOT_THE_MODEL = frozenset(
    {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "name_or_path"}
)
"""The entries of a configuration that say nothing about the numbers of the model."""

NOT_THE_ADAPTER = frozenset({"peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"})
"""The settings of `peft` that say nothing about the numbers of an adapter; the base is known by its weights."""


def described(model: nn.Module, adapter: Any) -> dict[str, Any]:
    """A digest of the model's configuration, and the settings of the `adapter` around it (None: there is none)."""
    config: Any = model.config
    return in_values(config.to_dict(), adapter and adapter.peft_config[adapter.active_adapter].to_dict())


def in_values(config: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """A configuration as a digest, and the settings of an adapter, as values for JSON."""
    own = {name: value for name, value in config.items() if name not in NOT_THE_MODEL and name[0] != "_"}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    if adapter is None:
        return {"configuration": digest, "adapter": None}
    return {
        "configuration": digest,
        "adapter": {name: _plain(value) for name, value in sorted(adapter.items()) if name not in NOT_THE_ADAPTER},
    }


SAMPLE = "In 1984, it's 3.14 × 10^2:\n\n\tdef f(x_1): return [x_1 == 0x7F]  # naïve — Übung, 東京, Москва 🙂\r\n"
"""A text with something of everything, whose tokens say how a tokenizer cuts."""

_DIGESTS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: of its tokens and their numbers, and of how it cuts a text."""
    if tokenizer not in _DIGESTS:
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
        try:
            cut = list(tokenizer(SAMPLE)["input_ids"])
        except Exception:  # it knows no other letters than its own
            cut = []
        content = json.dumps([tokens, cut])
        _DIGESTS[tokenizer] = hashlib.sha256(content.encode()).hexdigest()
    return _DIGESTS[tokenizer]


def _plain(value: Any) -> Any:
    """A setting as JSON has it; sets are sorted lists."""
    if isinstance(value, set | frozenset | list | tuple):
        values = [_plain(entry) for entry in value]
        return sorted(values, key=str) if isinstance(value, set | frozenset) else values
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    value = value.value if isinstance(value, Enum) else value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
