"""Mistakes that change no result, each with the reason; they are never drawn.

A mistake is known by its file, the text of its line, and what it changes into what.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
