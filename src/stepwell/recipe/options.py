"""Options of methods and tasks as words: name=value."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from stepwell.errors import InputError


def options_from(words: Sequence[str]) -> dict[str, Any]:
    """Options written as name=value; values are numbers, true, false, none, or else text.

    Example:
        >>> options_from(["clip=0.1", "skip_equal=false", "pairs=all"])
        {'clip': 0.1, 'skip_equal': False, 'pairs': 'all'}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(f"The option '{word}' has no value; write it as name=value, such as clip=0.1.")
        if name in options:
            raise InputError(f"The option '{name}' is set twice; set it once.")
        options[name] = value_from(value.strip())
    return options


def value_from(text: str) -> Any:
    """A number, true, false, none, or else the text itself."""
    named = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
