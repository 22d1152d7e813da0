"""Cards: what a method needs is read off its parts, and the command that a card prints is one that can be typed."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys

import pytest

from stepwell import methods
from stepwell.check.methods import check_method
from stepwell.check.oracles.registry import oracles
from stepwell.cli import COMMANDS
from stepwell.cli.arguments import parse
from stepwell.errors import InputError, UnknownName
from stepwell.objective.policy import Policy
from stepwell.recipe.card import Card
from stepwell.recipe.needs import needs_of
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import CARDS, method
from stepwell.recipe.source import unread

NEEDS = {
    "reinforce": [],
    "grpo": ["at least 2 samples a prompt"],
    "ppo": [
        "memory for a value head, which is added to the model and trained with it",
        "2 passes over each rollout, in 2 updates a pass",
    ],
    "dpo": ["at least 2 samples a prompt", "memory for a reference, a frozen copy of the policy as training began"],
    "sppo": ["memory for a reference, a frozen copy of the policy renewed every step"],
    "gkd": ["a teacher, a second model with the same vocabulary", "memory for the logits of every trained step"],
    "luffy": ["a column 'demonstration' in the data, filled in every row", "at least 2 samples a prompt"],
    "guide": ["a column 'hinted' in the data, for the prompts that have a hint", "at least 2 samples a prompt"],
    "constrained-rlhf": ["2 reward functions", "at least 2 samples a prompt"],
    "draft-k": ["a reward that is differentiable in the sample"],
    "euphonium": ["a reward that is differentiable in the sample", "at least 2 samples a prompt"],
    "remax": ["a process that can take its likeliest step"],
    "sspo": ["at least 2 samples a prompt", "rows in segments: sentences, unless the process marks its own"],
    "mdpo": ["at least 2 samples a prompt", "4 passes over each rollout, in one update a pass"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_needs_are_those_of_the_parts(name):
    assert [need.words for need in methods.get(name).needs] == NEEDS[name]


def test_needs_follow_the_options():
    grpo = methods.get("grpo")
    plain, penalised = ([need.words for need in needs_of(grpo.recipe(kl=kl))] for kl in (0.0, 0.1))
    assert penalised == [*plain, "memory for a reference, a frozen copy of the policy as training began"]


@pytest.mark.parametrize("name", methods.names())
def test_a_card_advises_in_one_sentence(name):
    card = methods.get(name)
    assert card.when.endswith(".")
    assert ". " not in card.when.replace("e.g. ", "")
    assert len(card.when) <= 110
    assert card.when != card.differs


@pytest.mark.parametrize("name", methods.names())
def test_the_command_of_a_card_can_be_typed(name):
    program, *words = shlex.split(methods.get(name).command)
    assert program == "stepwell"
    command = parse(words, COMMANDS, program, "")
    assert (command.method, command.out) == (name, "runs/a")


def test_a_second_reward_and_a_teacher_are_in_the_command():
    assert methods.get("constrained-rlhf").command.count(" --reward ") == 2
    assert " --teacher " in methods.get("gkd").command
    assert " --teacher " not in methods.get("grpo").command


@pytest.mark.parametrize("name", methods.names())
def test_a_card_holds_parts_options_paper_and_proof(name):
    about = methods.get(name).as_dict()
    assert {entry.name for entry in dataclasses.fields(Card)} - {"build"} <= set(about)
    assert {"options", "needs", "command", "parts"} <= set(about)
    assert about["parts"]
    assert set(about["proof"]) <= set(oracles())


def test_the_order_in_which_files_are_imported_does_not_matter():
    script = (
        "import importlib, pkgutil, sys\n"
        "import stepwell.methods as room\n"
        "found = [each.name for each in pkgutil.walk_packages(room.__path__, 'stepwell.methods.') if not each.ispkg]\n"
        "for name in found[:: int(sys.argv[1])]: importlib.import_module(name)\n"
        "print([room.get(name).id for name in room.names()])"
    )
    lists = [
        subprocess.run([sys.executable, "-c", script, step], capture_output=True, text=True, check=True).stdout
        for step in ("1", "-1")
    ]
    assert lists[0] == lists[1] == f"{methods.names()}\n"


@pytest.fixture
def planted():
    """Registers a method as a user would, and takes it out again."""

    def build() -> Recipe:
        return Recipe(Policy())

    yield lambda **card: method("planted", title="Planted", **card)(build)
    methods.forget("planted")


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"processes": ("langauge",)}, "no kind of process for method 'planted' 'langauge'; did you mean 'language'"),
        ({"processes": "language"}, "The processes of method 'planted' must be a tuple of kinds, got 'language'"),
        ({"processes": ()}, "The processes of method 'planted' must be a tuple of kinds"),
        ({"kind": "trainig"}, "There is no kind of method for 'planted' 'trainig'; did you mean 'training'"),
        ({"aliases": "plant"}, "The aliases of method 'planted' must be a tuple of names such as ids, got 'plant'"),
        ({"aliases": ("two words",)}, "The aliases of method 'planted' must be a tuple of names such as ids"),
        ({"proof": "law"}, "The proof of method 'planted' must be a tuple of oracles' names, got 'law'"),
        ({"whenn": "Never."}, "There is no entry of the card of 'planted' named 'whenn'; did you mean 'when'"),
    ],
)
def test_a_wrong_entry_of_a_card_is_refused_at_registration(planted, card, words):
    with pytest.raises(InputError, match=words):
        planted(**card)
    assert "planted" not in CARDS


def test_a_number_of_a_recipe_out_of_its_range_is_refused():
    for name in ("epochs", "minibatches", "sync_every"):
        with pytest.raises(InputError, match=f"Recipe.{name} must be a whole number, at least 1, got 0"):
            Recipe(Policy(), **{name: 0})
        with pytest.raises(InputError, match=f"Recipe.{name} must be a whole number, at least 1, got 1.5"):
            Recipe(Policy(), **{name: 1.5})
    with pytest.raises(UnknownName, match="There is no part 'epoch'; did you mean 'epochs'"):
        Recipe(Policy()).replace(epoch=2)


def test_an_option_that_no_part_reads_is_refused_by_the_check():
    def planted(clip: float = 0.2, idle: int = 3) -> Recipe:
        return Recipe(clip * Policy())

    with pytest.raises(InputError, match="Option 'idle' of method 'planted' must be used: its function never reads it"):
        check_method(Card("planted", "Planted", planted))


def test_an_option_that_an_inner_function_reads_is_used():
    def planted(scale: float = 0.2, both: float = 1.0) -> Recipe:
        return Recipe((lambda: scale * both * Policy())())

    assert unread(planted) == []


@pytest.mark.parametrize("name", methods.names())
def test_no_method_has_an_option_that_it_never_reads(name):
    assert unread(methods.get(name).build) == []
