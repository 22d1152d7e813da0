"""Plugins and options of methods that make no sense end with exit code 2 and one line that says what is right."""

from __future__ import annotations

from typing import Any

import pytest

from stepwell import methods
from stepwell.cli import main
from stepwell.errors import InputError, UnknownName

HEAD = "from stepwell import Recipe, method\nfrom stepwell.methods import get\n"
HEAD += "from stepwell.objective.policy import Policy\n"
MINE = HEAD + "@method('mine', title='Mine'{})\ndef mine({}):\n    {}\n"
GOOD = "return get('rloo').recipe()"
PLUGINS = {
    "raises": ("1 / 0", "mine.py' failed at line 1: ZeroDivisionError: division by zero."),
    "exits": ("raise SystemExit", "mine.py' failed at line 1: SystemExit."),
    "syntax": ("def f(:", "mine.py' failed at line 1: SyntaxError: invalid syntax."),
    "taken id": (
        MINE.replace("'mine'", "'grpo'").format("", "", GOOD),
        "There is a method 'grpo' already, from stepwell",
    ),
    "twice": (
        MINE.format("", "", GOOD) + MINE.replace("def mine", "def other").format("", "", GOOD),
        "There is a method 'mine' already, from ",
    ),
    "id of no text": (
        MINE.replace("'mine'", "3").format("", "", GOOD),
        "The id of a method must be a text without spaces,",
    ),
    "id of two words": (
        MINE.replace("'mine'", "'my own'").format("", "", GOOD),
        "The id of a method must be a text without spaces",
    ),
    "id with a comma": (
        MINE.replace("'mine'", "'a,b'").format("", "", GOOD),
        "The id of a method must be a text without spaces",
    ),
    "no default": (
        MINE.format("", "clip", GOOD),
        "Option 'clip' of method 'mine' has no default; every option needs one.",
    ),
    "any options": (MINE.format("", "**options", GOOD), "Option 'options' of method 'mine' has no default"),
    "a class": (
        HEAD + "@method('mine', title='M')\nclass Mine: ...",
        "A method must be built by a function, got <class",
    ),
    "unknown kind of process": (
        MINE.format(", processes=('langauge',)", "", GOOD),
        "no kind of process for method 'mine' 'langauge'; did you mean 'lan",
    ),
    "unknown entry": (
        MINE.format(", papr='x'", "", GOOD),
        "no entry of the card of 'mine' named 'papr'; did you mean 'pap",
    ),
    "proof as a text": (
        MINE.format(", proof='tree'", "", GOOD),
        "The proof of method 'mine' must be a tuple of oracles",
    ),
    "no recipe": (MINE.format("", "", "return 3"), "The method 'mine' must return a Recipe, got int."),
    "nothing": (MINE.format("", "", "..."), "The method 'mine' must return a Recipe, got NoneType."),
    "async": (
        MINE.replace("def", "async def").format("", "", GOOD),
        "The method 'mine' must return a Recipe, got coroutine",
    ),
    "fails": (MINE.format("", "", "1 / 0"), "'mine' cannot be built; its function failed at line 6: ZeroDivisionError"),
    "fails with an option": (
        MINE.format("", "size=1", "1 / (size - 2)"),
        "'mine' cannot be built with size=2; its function failed at line 6: ZeroDivisionError: division by zero.",
    ),
    "recipe of a number": (
        MINE.format("", "", "return Recipe(3)"),
        "Recipe.objective must be a Term",
    ),
    "number for a part": (
        MINE.format("", "", "return Recipe(Policy(ratio=3))"),
        "Policy.ratio must be a Ratio, got 3.",
    ),
    "unknown part": (
        MINE.format("", "", "return get('rloo').recipe().replace(rati=3)"),
        "There is no part 'rati'; did you mean 'ratio'?",
    ),
    "unknown name in a recipe": (
        MINE.format("", "", "return Recipe(Policy(), reference='synked')"),
        "Recipe.reference must be one of start, synced; got 'synked', did you mean 'synced'?",
    ),
}


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_plugin_that_registers_nonsense(plugged, kind):
    lines, said = PLUGINS[kind]
    plugged.write("mine.py", lines)
    option = " --set size=2" if "size" in lines else ""
    words = plugged.words(f"--plugin mine.py --method {'grpo' if kind == 'taken id' else 'mine'}{option}")
    assert said in plugged.refused(*words)


def test_an_oracle_there_is_not_is_told_when_the_proof_is_asked_for(plugged):
    plugged.write("mine.py", MINE.format(", proof=('unbiased_gradiant',)", "", GOOD))
    line = plugged.refused("check", "mine", "--plugin", "mine.py")
    assert "There is no oracle 'unbiased_gradiant'; did you mean 'unbiased_gradient'?" in line


def test_a_plugin_may_be_run_again(plugged):
    plugged.write("mine.py", MINE.format("", "", GOOD))
    for _ in range(2):
        assert main(["methods", "mine", "--plugin", "mine.py"]) == 0


# options of methods


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("grpo --set clip=wide", "Option 'clip' of grpo must be a number, got 'wide'."),
        ("grpo --set clip=nan", "Option 'clip' of grpo must be a number, got 'nan'."),
        ("grpo --set clip=none", "Option 'clip' of grpo must be a number, got None."),
        ("grpo --set clp=0.1", "There is no option of grpo 'clp'; did you mean 'clip'?"),
        ("grpo --set kl=-1", "Option 'kl' of grpo must be a finite number, 0 or more, got -1."),
        ("grpo --set kl=1e999", "Option 'kl' of grpo must be a finite number, 0 or more, got inf."),
        ("grpo --set epsilon=-1", "Option 'epsilon' of grpo must be a finite number, 0 or more, got -1."),
        ("turn-ppo --set gamma=2", "GeneralisedAdvantage.gamma must be a number from 0 to 1, got 2."),
        ("turn-ppo --set lam=-0.1", "GeneralisedAdvantage.lam must be a number from 0 to 1, got -0.1."),
        ("turn-ppo --set epochs=0", "Recipe.epochs must be a whole number, at least 1, got 0."),
        ("turn-ppo --set epochs=1.5", "Option 'epochs' of turn-ppo must be a whole number, got 1.5."),
        ("turn-ppo --minibatches 3", "Settings.minibatches must be at most the 2 prompts of a step, got 3."),
        (
            "ppo --set value_coefficient=-1",
            "ValueLoss.coefficient must be a finite number, 0 or more, or a Coefficient, got -1.",
        ),
        (
            "opo --set variant=publishd",
            "Option 'variant' of opo must be one of corrected, published; got 'publishd', did you mean 'published'?",
        ),
        ("otb --set variant=3", "Option 'variant' of otb must be a text, got 3."),
        (
            "iterative-dpo --set reference=strat",
            "Option 'reference' of iterative-dpo must be one of start, synced; got 'strat', did you mean 'start'?",
        ),
        ("dpo --set loss=sigmoi", "There is no preference loss 'sigmoi'; did you mean 'sigmoid'?"),
        ("dpo --set beta=0", "Logistic.beta must be a finite number above 0, got 0."),
        ("dpo --set smoothing=0.7", "Logistic.smoothing must be a number from 0 to 1/2, got 0.7."),
        ("slic --set margin=0", "Option 'margin' of slic must be a finite number above 0, got 0."),
        ("vargrad --set beta=-1", "Option 'beta' of vargrad must be a finite number above 0, got -1."),
        ("treepo --set segment=0", "SegmentTree.segment must be a whole number, at least 1, got 0."),
        ("treepo --set depth=0", "Option 'depth' of treepo must be a whole number, at least 1, got 0."),
        ("vineppo --set vines=-1", "Vines.vines must be a whole number, at least 1, got -1."),
        ("high-entropy --set top=0", "HighEntropy.top must be a number above 0 and at most 1, got 0."),
        ("thr --set p=2", "HiddenReward.p must be a number from -1 to 1, got 2."),
        (
            "rl-plus --set share=2",
            "MixtureDenominator.components must have weights of 0 or more that sum to 1, got [-1, 2].",
        ),
        ("d3s --set rows=-1", "MostSpread.share must be a number above 0 and at most 1, or a Coefficient, got a Ramp"),
        ("dual-clip --set c=0.5", "Clip.dual must be a finite number above 1, or None, got 0.5."),
        (
            "two-sided-clip --set delta=1",
            "Clip.delta must be above 1 + high = 1.2, where the ratio is clipped already, or None,",
        ),
        ("dapo --set refill=0", "DynamicSampling.limit must be a number from 1 on, got 0."),
        ("dapo --set buffer=-1", "Overlong.buffer must be a number above 0 and at most 1, got -1."),
    ],
)
def test_an_option_that_makes_no_sense(talk, changes, said):
    assert said in talk.refused(*talk.words(f"--method {changes}"))
    assert not talk.out.exists()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("grpo", {"clip": float("nan")}, "Option 'clip' of grpo must be a number, got nan"),
        ("flow-grpo", {"steps": 0}, "Option 'steps' of flow-grpo must be a whole number, at least 1, got 0"),
        ("flow-grpo", {"level": -1}, "Option 'level' of flow-grpo must be a finite number, 0 or more, got -1"),
        ("flow-grpo", {"clip": float("nan")}, r"Clip\.low must be a finite number, 0 or more, got nan"),
        ("mix-grpo", {"flash": 2}, "Option 'flash' of mix-grpo must be a number from 0 to 1, got 2"),
        ("alignprop", {"least": 20}, r"DirectReward\.up_to must be at least depth = 20, got 10"),
        ("vespo", {"positive_rate": -1.0}, r"GammaScore\.positive must be .* finite and 0 or more, got \(2.0, -1.0\)"),
        ("bnpo", {"kl": -1}, r"Regulariser\.coefficient of a divergence must be 0 or more, got -1, "),
        ("constrained-rlhf", {"price": -1}, r"Multiplier\.initial must be a finite number, 0 or more, got -1"),
    ],
)
def test_an_option_that_makes_no_sense_from_python(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        methods.get(method).recipe(**options)


def test_every_method_refuses_numbers_that_are_none() -> None:
    """NaN is no value of any option, and a text none of an option that is a number."""
    for name in methods.names():
        card = methods.get(name)
        for option, default in card.options.items():
            if isinstance(default, int | float):
                for value in (float("nan"), "wide"):
                    with pytest.raises(InputError):
                        card.recipe(**{option: value})
            elif isinstance(default, str) and option != "solver":  # a solver's name is looked up where it is used
                with pytest.raises((UnknownName, InputError)):
                    card.recipe(**{option: "nothing of the kind"})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["import math", "math.sqrt(-1)"], "mine.py' failed at line 2: ValueError"),
        (["def f(:"], "mine.py' failed at line 1: SyntaxError"),
        (
            [
                "from stepwell.methods import method, get",
                "@method('grpo', title='Mine')",
                "def mine():",
                "    return get('rloo').recipe()",
            ],
            "There is a method 'grpo' already, from stepwell; give yours another name.",
        ),
        (
            [
                "from stepwell.methods import method",
                "@method('mine', title='Mine')",
                "def mine(clip): ...",
            ],
            "Option 'clip' of method 'mine' has no default",
        ),
    ],
    ids=["raises", "syntax", "name taken", "no default"],
)
def test_a_plugin_that_fails(bench, lines, said):
    bench.write("mine.py", *lines)
    before = methods.names()
    assert said in bench.refused(*bench.words("--plugin", "mine.py"))
    assert not bench.out.exists()
    assert methods.names() == before


def test_two_plugins_with_a_method_of_one_name(bench):
    lines = (
        "from stepwell.methods import method, get",
        "@method('mine', title='Mine')",
        "def mine():",
        "    return get('rloo').recipe()",
    )
    bench.write("one.py", *lines)
    bench.write("two.py", *lines)
    try:
        line = bench.refused("methods", "--plugin", "one.py", "--plugin", "two.py")
    finally:
        methods.forget("mine")
    assert f"There is a method 'mine' already, from {bench.folder}/one.py; give yours another name." in line
    assert f"There is no plugin file '{bench.folder}/three.py'" in bench.refused("methods", "--plugin", "three.py")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return {}['recipe']", "its function failed at line 4: KeyError: 'recipe'"),
        ("    return Recipe(clip=2)", "its function failed at line 4: TypeError"),
        ("    return None", "The method 'mine' must return a Recipe, got NoneType."),
    ],
)
@pytest.mark.parametrize("command", ["train", "check", "methods", "compare"])
def test_a_method_of_one_s_own_that_cannot_be_built(bench, command, body, said):
    head = "from stepwell import Recipe, method", "@method('mine', title='Mine')", "def mine(clip: float = 0.2):"
    bench.write("mine.py", *head, body)
    words = {
        "train": bench.words("--method", "mine"),
        "check": ["check", "mine"],
        "methods": ["methods", "mine"],
        "compare": ["compare", "mixture", "--methods", "mine", "--budget", "1-steps", "--out", "run"],
    }
    try:
        assert said in bench.refused(*words[command], "--plugin", "mine.py")
    finally:
        methods.forget("mine")
    assert not bench.out.exists()
