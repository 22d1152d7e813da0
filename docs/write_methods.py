"""Writes docs/methods.md from the cards of all methods; a test says whether it is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stepwell import methods
from stepwell.methods import Card

HEAD = """# The methods

Written by `make docs` from the cards; `stepwell methods ID` prints the same, `stepwell methods --search WORDS` finds
them. A method is run by `stepwell train --model DIR_OR_ID --data prompts.jsonl --reward my.py:reward --method ID`, with
the arguments that its needs name, and without `--reward` where it says so. Case, hyphens and underscores of an ID do
not matter. `stepwell check ID` computes the exact answers that stand behind *proved by*, and compares the method.
"""


def page() -> str:
    """The whole page: the cards in the order of their ids."""
    return HEAD + "\n" + "\n\n".join("\n\n".join(section(methods.get(name))) for name in methods.names()) + "\n"


def section(card: Card) -> Iterator[str]:
    """The paragraphs of one card."""
    about = card.as_dict()
    also = f" (also {', '.join(f'`{alias}`' for alias in card.aliases)})" if card.aliases else ""
    link = f" [{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
    yield f"## `{card.id}` {card.title}{also}"
    if card.paper:
        yield f"*{card.paper}* ({card.year}){link}"
    yield card.differs
    yield f"When to use it: {card.when[:1].lower()}{card.when[1:]}"
    if card.note:
        yield f"Note: {card.note}"
    if card.needs:
        needs = "; ".join(f"{need.words}{f' (`{need.arguments}`)' if need.arguments else ''}" for need in card.needs)
        yield f"Needs: {needs}."
    if not card.recipe().rewarded:
        yield "No reward is needed; one that is given is only logged."
    yield "Parts: " + "; ".join(f"`{part}`" for part in about["parts"]) + "."
    yield "Options: " + ", ".join(f"`{option}={default}`" for option, default in card.options.items()) + "."
    yield "Proved by: " + ", ".join(f"`{proof}`" for proof in card.proof) + "."


if __name__ == "__main__":
    Path(__file__).with_name("methods.md").write_text(page())
