"""Processes small enough to enumerate, and data with closed forms: the yardsticks of every proof."""

from stepwell.process.exact.table import TabularLanguage, conditioned, markov

__all__ = ["TabularLanguage", "conditioned", "markov"]
