"""Writes docs/methods.md from the cards of all methods; a test says whether it is up to date."""

from __future__ import annotations

from pathlib import Path

from stepwell import methods


def page() -> str:
    lines = ["# The methods", "", "Written by `make docs` from the cards; `stepwell methods ID` prints the same.", ""]
    for name in methods.names():
        card = methods.get(name)
        told = card.as_dict()
        source = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
        lines += [
            f"## `{name}` {card.title}",
            "",
            f"*{card.paper}* ({card.year}) {source}".rstrip(),
            "",
            card.differs,
            "",
            *([f"As published: {card.note}", ""] if card.note else []),
        ]
        lines += ["Parts: " + "; ".join(f"`{part}`" for part in told["parts"]) + ".", ""]
        options = ", ".join(f"`{option}={default}`" for option, default in told["options"].items())
        lines += [f"Options: {options}.", "", "Proved by: " + ", ".join(f"`{proof}`" for proof in card.proof) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("methods.md").write_text(page())
