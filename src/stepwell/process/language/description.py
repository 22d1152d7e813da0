"""A model of `transformers` and its adapter in values for JSON: all that decides its numbers besides its parameters."""

from __future__ import annotations

import hashlib
import json
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
    own = {name: value for name, value in config.to_dict().items() if name not in NOT_THE_MODEL and name[0] != "_"}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    if adapter is None:
        return {"configuration": digest, "adapter": None}
    settings = adapter.peft_config[adapter.active_adapter].to_dict()
    return {
        "configuration": digest,
        "adapter": {name: _plain(value) for name, value in sorted(settings.items()) if name not in NOT_THE_ADAPTER},
    }


def _plain(value: Any) -> Any:
    """A setting as JSON has it; sets are sorted lists."""
    if isinstance(value, set | frozenset | list | tuple):
        values = [_plain(entry) for entry in value]
        return sorted(values, key=str) if isinstance(value, set | frozenset) else values
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    value = value.value if isinstance(value, Enum) else value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
