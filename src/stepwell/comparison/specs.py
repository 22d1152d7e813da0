"""The methods of a comparison as a user writes them: `grpo,gspo:low=1e-3,high=2e-3`; checked before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwell import methods
from stepwell.errors import InputError
from stepwell.methods import Card
from stepwell.recipe.options import options_from
from stepwell.recipe.recipe import Recipe


@dataclass(frozen=True)
class MethodSpec:
    """A method with options, and the label it goes by in a comparison."""

    label: str
    card: Card
    options: dict[str, Any]

    def recipe(self) -> Recipe:
        """The composition, built anew."""
        return self.card.recipe(**self.options)


def parse_specs(written: str | Sequence[str], shared: Mapping[str, Any] | None = None) -> list[MethodSpec]:
    """Methods written as `name` or `name:option=value,option=value`, in one text with commas between, or in a list.

    Options may also be separated by colons; `shared` are further ones of every method. A method may appear twice with
    different options. Raises `UnknownName` for an unknown method or option, and `InputError` for any other mistake, in
    the order written.

    Example:
        >>> [spec.label for spec in parse_specs("grpo,gspo:low=1e-3,high=2e-3,grpo:clip=0.1")]
        ['grpo', 'gspo:low=0.001,high=0.002', 'grpo:clip=0.1']
    """
    texts = [written] if isinstance(written, str) else list(written)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"methods must be written as texts, such as 'grpo:clip=0.1', got {text!r:.60}.")
    pieces = [piece.strip() for text in texts for piece in text.split(",") if piece.strip()]
    whole: list[list[str]] = []
    for piece in pieces:
        name, *settings = (part.strip() for part in piece.split(":"))
        if "=" in name and not settings and whole:  # a further option of the method before
            whole[-1].append(name)
        else:
            whole.append([name, *settings])
    specs: list[MethodSpec] = []
    for words in whole:
        name = words[0]
        if "=" in name:
            raise InputError(f"'{name}' is an option without a method; write it as method:{name}.")
        card, options = methods.get(name), options_from(words[1:])
        for option in shared or {}:
            if option in options:
                raise InputError(f"The option '{option}' of {card.id} is set twice; set it once.")
        options = {**options, **(shared or {})}
        label = card.id + ("" if not options else ":" + ",".join(f"{key}={value}" for key, value in options.items()))
        spec = MethodSpec(label, card, options)
        spec.recipe()
        if label in [other.label for other in specs]:
            raise InputError(f"The method '{label}' is given twice; give it once, or with other options.")
        specs.append(spec)
    if not specs:
        raise InputError("methods must name at least one, got none; write them as grpo,dr-grpo.")
    return specs
