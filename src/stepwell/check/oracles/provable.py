"""A method's card as oracles see it, and the deviation of two answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from stepwell.objective.policy import Policy
from stepwell.recipe.recipe import Recipe


class Provable(Protocol):
    """A card as far as oracles see it."""

    id: str
    processes: tuple[str, ...]
    proof: tuple[str, ...]

    @property
    def options(self) -> Mapping[str, Any]: ...

    def recipe(self, **options: Any) -> Recipe: ...


def deviation(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def policy_of(card: Provable, **options: Any) -> Policy:
    """The first term of the method's objective."""
    term = card.recipe(**options).whole.terms[0]
    assert isinstance(term, Policy)
    return term


def known(card: Provable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has."""
    return {name: value for name, value in options.items() if name in card.options}


def variants(card: Provable) -> Iterator[dict[str, Any]]:
    """The options of every variant of a method: corrected and published, or none at all."""
    for variant in ("corrected", "published") if "variant" in card.options else (None,):
        yield {} if variant is None else {"variant": variant}
