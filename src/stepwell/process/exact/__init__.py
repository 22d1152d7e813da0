"""Processes small enough to enumerate, and data with closed forms: the yardsticks of every proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepwell.process.exact.table import TabularLanguage as TabularLanguage
    from stepwell.process.exact.table import conditioned as conditioned
    from stepwell.process.exact.table import markov as markov

__all__ = ["TabularLanguage", "conditioned", "markov"]


def __getattr__(name: str) -> Any:
    """Import the table when one of its names is first asked for."""
    if name not in __all__:
        raise AttributeError(f"stepwell.process.exact has no '{name}'; it offers {', '.join(__all__)}")
    from stepwell.process.exact import table

    return getattr(table, name)
