"""Mistakes that change no result, each with the reason; they are never drawn.

A mistake is known by its file, the text of its line, and what it changes into what.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("tasks/warm_start.py", "batch: int = 96", "96", "97"): (
        "The batches by which a task's start imitates are a choice: with one text more it is as good a start."
    ),
}
