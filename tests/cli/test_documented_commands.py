"""Every command that the README and the pages of docs show can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stepwell.cli import COMMANDS
from stepwell.cli.arguments import parse
from stepwell.comparison.specs import parse_specs
from stepwell.methods import catalogue
from stepwell.recipe.options import options_from
from stepwell.tasks.registry import entry_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = {"above-average", "ones", "tanh-grpo"}
"""Methods and tasks that the pages themselves make, in plugins."""


def commands() -> list[tuple[str, str]]:
    """The page and the text of each command: lines of shell blocks, and commands in the midst of sentences."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.S)).replace("\\\n", " ")
        lines = [line.split("  #")[0].split(";")[0].strip(" $") for line in blocks.splitlines()]
        inside = [
            " ".join(code.split())
            for code in re.findall(r"`(stepwell \w+ [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
        ]
        found += [(page.name, line) for line in [*lines, *inside] if line.startswith("stepwell ")]
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_a_command_of_a_page_can_be_typed(page, command):
    if re.search(r"\.\.\.|\bCOMMAND\b", command):  # an abbreviation
        return
    _, *words = shlex.split(command)
    parsed = parse(words, COMMANDS, "stepwell", "")
    if words[0] == "train" and parsed.method not in {*OWN, "ID"}:
        catalogue.get(parsed.method).recipe(**options_from(parsed.set))
    if words[0] == "compare":
        names = [name for name in parsed.methods.split(",") if name.split(":")[0] not in OWN and "=" not in name]
        parse_specs(names)
        assert parsed.task in OWN or entry_of(parsed.task)


def test_the_pages_show_commands_of_every_kind():
    shown = {command.split()[1] for _, command in commands()}
    assert {"methods", "train", "sample", "compare", "report", "check", "solvers"} <= shown
    assert len(commands()) > 20
