"""Groups of arguments that several kinds of model use, and types of arguments that are not always given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stepwell.cli.command import Flag
from stepwell.errors import InputError


def _unless_given(metavar: str | None = None) -> Any:
    """Show no default in the help: the comment says what holds unless the argument is given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


Text = Annotated[str | None, _unless_given("STR")]
File = Annotated[str | None, _unless_given("PATH")]
Number = Annotated[float | None, _unless_given("FLOAT")]
Whole = Annotated[int | None, _unless_given("INT")]
Texts = Annotated[tuple[str, ...], _unless_given("STR ...")]
Numbers = Annotated[tuple[float, ...], _unless_given("FLOAT ...")]
Wholes = Annotated[tuple[int, ...], _unless_given("INT ...")]


@dataclass(kw_only=True)
class LoadingOptions:
    """The number format and the device of a language model or a pipeline."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # the number format of the parameters
    device: Text = None  # cpu, cuda, ...; the accelerator, if there is one, unless given


@dataclass(kw_only=True)
class AdapterOptions:
    """A LoRA adapter, trained in place of the whole language model or pipeline."""

    lora: Flag = False  # train an adapter of rank 8
    lora_rank: Whole = None  # train an adapter of this rank
    lora_alpha: Whole = None  # the adapter's scale; twice the rank unless given
    lora_targets: Texts = ()  # the layers that are adapted; peft's choice for the model unless given

    def settings(self) -> dict[str, Any] | None:
        """The adapter's settings as peft takes them; None for no adapter."""
        rank = 8 if self.lora and self.lora_rank is None else self.lora_rank  # peft's own default
        if rank is None:
            if self.lora_alpha is not None or self.lora_targets:
                name = "--lora-targets" if self.lora_alpha is None else "--lora-alpha"
                raise InputError(f"{name} needs --lora-rank, or --lora for a rank of 8.")
            return None
        alpha = 2 * rank if self.lora_alpha is None else self.lora_alpha
        named: Any = list(self.lora_targets)
        targets = {"target_modules": "all-linear" if named == ["all-linear"] else named} if named else {}
        return {"r": rank, "lora_alpha": alpha, **targets}


@dataclass(kw_only=True)
class WeightsOptions:
    """Weights of an earlier run."""

    weights: File = None  # the folder of a run of the same network, or its model.safetensors


def load_weights(process: Any, file: str) -> None:
    """Put the weights of a run (its folder, or its `model.safetensors`) into the process's network."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file) / "model.safetensors" if Path(file).is_dir() else Path(file)
    try:
        process.module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"There are no weights in '{path}': {' '.join(str(error).split())}.") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The weights in '{path}' are those of another network: {reason:.160}.") from error
