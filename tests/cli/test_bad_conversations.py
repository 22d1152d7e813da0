"""Conversations, plugins and options that cannot work end with exit code 2 and one line that says what is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepwell import methods
from stepwell.cli import main
from stepwell.errors import InputError, UnknownName

DESK = """
GOOD = ("d", 0.0, False, False, {})

class Desk:
    def reset(self, prompt, answer, **columns):
        self.answer = answer

    def step(self, message):
        return " d", float(self.answer in message), False, False, {}

def make():
    return Desk()

"""
STEP = "class Mine(Desk):\n    def step(self, message): {}\n"
RESET = "class Mine(Desk):\n    def reset{}\n"


class Bench:
    """A folder with models, data and an environment, in which commands are run as a user would run them."""

    def __init__(self, folder: Path, models: dict[str, Path], refused: Callable[..., str]):
        self.folder, self.out, self.models, self._refused = folder, folder / "run", models, refused
        rows = [{"prompt": f"{letter} b c", "answer": letter} for letter in "abcd"]
        chat = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        self.write("data.jsonl", *map(json.dumps, rows))
        self.write("chat.jsonl", *map(json.dumps, chat))
        for column in ("turns", "environment_return", "truncated"):
            self.write(f"{column}.jsonl", json.dumps({"prompt": "a b", "answer": "a", column: 1}))
        self.write("half.jsonl", '{"prompt": "a \\ud800", "answer": "a"}')
        self.write("desk.py", DESK)

    def write(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines))
        return path

    def words(self, changes: str = "") -> list[str]:
        """The words of a conversation that is right, but for the changes; `-` takes one away, `=` empties it."""
        given = {"--model": [str(self.models["plain"])], "--data": ["data.jsonl"], "--environment": ["desk.py:Desk"]}
        given |= {"--out": ["run"], "--steps": ["1"], "--prompts-per-step": ["2"], "--group-size": ["2"]}
        given |= {"--max-new-tokens": ["30"], "--turn-stop": ["a", "c", "f"], "--device": ["cpu"], "--no-progress": []}
        name = ""
        for word in changes.split():
            if word.startswith("--"):
                name = word
                given[name] = []
            elif word == "-":
                del given[name]
            else:
                given[name].append("" if word == "=" else str(self.models.get(word, word)))
        return ["train", *(word for name, values in given.items() for word in (name, *values))]

    def refused(self, *words: str) -> str:
        """The one line a command is refused with; whatever it left behind is whole, and no step of a run."""
        line = self._refused(*words)
        left = [path.name for path in self.out.rglob("*")]
        assert left in ([], ["run.json"])
        if left:
            json.loads((self.out / "run.json").read_text())
        return line


@pytest.fixture
def bench(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.chdir(tmp_path)
    models = {"plain": model_folder("gpt2"), "chatty": model_folder("gpt2", chat=True)}
    return Bench(tmp_path, models, refused)


@pytest.mark.parametrize(
    "changes",
    ["", "--environment desk.py:make", "--model chatty --data chat.jsonl --turn-role tool --max-turns 2"],
)
def test_the_conversation_that_the_others_spoil_is_right(bench, changes):
    assert main(bench.words(changes)) == 0


def test_an_environment_that_never_ends_or_says_too_much_is_cut(bench):
    bench.write("long.py", DESK, STEP.format('return "d " * 100, 1.0, False, False, {}'))
    for out, words in (("run", "--max-turns 2"), ("other", "--environment long.py:Mine")):
        assert main(bench.words(f"{words} --out {out}")) == 0
        assert json.loads((bench.folder / out / "metrics.jsonl").read_text())["truncated"] > 0


def test_several_rewards_with_what_the_environment_pays_among_them(bench):
    words = bench.words("--reward-weights 1 0.5")
    assert main([*words, "--reward", "environment_return", "--reward", "exact_match"]) == 0
    assert {"reward/environment_return", "reward/exact_match"} <= set(
        json.loads((bench.out / "metrics.jsonl").read_text())
    )


# the words of the command


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("--environment desk.py", "must name a file and a class or function in it, such as 'my.py:Env"),
        ("--environment =", "The environment must name a file and a class or function in it"),
        ("--environment dsk.py:Desk", "There is no file 'dsk.py'; did you mean 'desk.py'?"),
        ("--environment no.such:Desk", "There is no module 'no.such'; a file is named with its ending"),
        ("--environment data.jsonl:Desk", "file must be a Python file, whose name ends in .py, got 'data.jsonl'"),
        ("--environment desk.py:Deks", "no class or function of desk.py named 'Deks'; did you mean 'Desk'?"),
        ("--environment desk.py:GOOD", "'GOOD' in desk.py must be a class or function, got a value of type tuple."),
        ("--envronment desk.py:Desk", "There is no argument '--envronment'; did you mean '--environment'?"),
        ("--max-turns 0", "max_turns must be a whole number of at least 1, got 0"),
        ("--max-turns 2.5", "--max-turns must be a whole number, got '2.5'."),
        ("--turn-stop =", "stop must be a text, or texts, none of them empty, got ('',)"),
        ("--turn-role tool", "--turn-role must be left out: no prompt is a chat."),
        (
            "--turn-role = --model chatty --data chat.jsonl",
            "role must be the name of a chat's role, such as 'user' or 'tool', got ''",
        ),
        (
            "--environment - --reward exact_match",
            "--turn-stop needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop - --max-turns 8",
            "--max-turns needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop - --turn-role tool",
            "--turn-role needs --environment: it is about a conversation with one.",
        ),
        (
            "--environment - --turn-stop -",
            "--reward must be given, such as my.py:function; see `stepwell train --help` for others.",
        ),
        (
            "--environment - --turn-stop - --reward environment_return",
            "--reward environment_return needs --environment: it is the reward that an environment",
        ),
        ("--reward environment_retur", "no reward 'environment_retur'; did you mean 'environment_return'?"),
        ("--reward-weights 1 2", "Reward weights must be as many as the functions (environment_return), got 2 for 1"),
        ("--method flow-grpo", "The method 'flow-grpo' trains flows, and not language models"),
        ("--method grpo:clip=0.1", "--method must be an id, got 'grpo:clip=0.1'; set options by --method grpo --set"),
        ("--data chat.jsonl --method turn-ppo", "is a chat, but the tokenizer has no chat template; give a text."),
        ("--data half.jsonl", "half.jsonl, row 0: The prompt 'a \\ud800' holds half a character"),
        ("--data turns.jsonl", "A prompt has a column 'turns', and reward functions are given something else"),
        ("--data environment_return.jsonl", "A prompt has a column 'environment_return', and reward functions"),
        ("--data truncated.jsonl", "truncated.jsonl has a column 'truncated', and reward functions are given"),
    ],
)
def test_a_conversation_that_is_not_described(bench, changes, said):
    assert said in bench.refused(*bench.words(changes))


def test_environments_are_for_language_models(bench):
    (bench.folder / "pipe").mkdir()
    bench.write("pipe/model_index.json", json.dumps({"_class_name": "StableDiffusionPipeline"}))
    bench.write("flow.py", "def make(): ...")
    bare = "--max-new-tokens - --device - --turn-stop - --method flow-grpo"
    for model, called in (("pipe", "a pipeline"), ("flow.py:make", "a model of your own")):
        line = bench.refused(*bench.words(f"{bare} --model {model}"))
        assert f"--environment must be left out for {called}." in line
        line = bench.refused(*bench.words(f"{bare} --model {model} --environment - --max-turns 2"))
        assert f"--max-turns must be left out for {called}." in line


# the user's file


BROKEN = {
    "syntax": ("def f(:", "desk.py failed at line 13 while it was imported: SyntaxError"),
    "raises": ("1 / 0", "desk.py failed at line 13 while it was imported: ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "desk.py failed at line 13 while it was imported: SystemExit: 3"),
    "an object": ("Mine = Desk()", "'Mine' in desk.py must be a class or function, got a value of type Desk."),
    "needs arguments": (
        "class Mine(Desk):\n    def __init__(self, size): ...",
        "a class or a function without arguments, got 'desk.py:Mine' with (size).",
    ),
    "function needs arguments": (
        "def Mine(size): ...",
        "a class or a function without arguments, got 'desk.py:Mine' with (size).",
    ),
    "function returns nothing": ("def Mine(): ...", "and step(message), got None, which has no method"),
    "one for all": ("one = Desk()\ndef Mine(): return one", "must return a new object each time, got the same Desk"),
    "maker raises": (
        "class Mine(Desk):\n    def __init__(self): self.x = 1 / 0",
        "Mine raised ZeroDivisionError (division by zero) in the environment's factory at desk.py, line 14, for",
    ),
    "no reset": ("class Mine:\n    def step(self, message): ...", "a value of type Mine, which has no method 'reset'"),
    "no step": ("class Mine:\n    def reset(self, prompt): ...", "a value of type Mine, which has no method 'step'"),
    "step takes nothing": (
        "class Mine(Desk):\n    def step(self): ...",
        "must be callable as step(message), got the signature ()",
    ),
    "reset wants a column": (
        RESET.format("(self, prompt, target): ..."),
        "The reset of the environment Mine requires 'target', but the data has no such column; it has 'answer' besides",
    ),
    "reset looks for a column": (
        RESET.format("(self, prompt, **columns): columns['target']"),
        "Mine raised KeyError ('target') in reset at desk.py, line 14, for the prompt",
    ),
    "reset takes a column first": (
        RESET.format("(self, answer): ..."),
        "Mine must take the prompt first, as reset(prompt, **columns), got the column 'answer' there",
    ),
    "reset takes keywords only": (
        RESET.format("(self, *, seed=None): ..."),
        "must be callable as reset(prompt, **columns), got the signature (*, seed=None)",
    ),
    "reset is async": (
        "class Mine(Desk):\n    async def reset(self, prompt): ...",
        "The reset of the environment Mine must be a plain function, got an async one",
    ),
    "reset returns a number": (
        RESET.format("(self, prompt): return 3"),
        "returns from reset must be a text, or for a chat",
    ),
    "reset says too much": (
        RESET.format("(self, prompt): return 'a ' * 40"),
        "take 40 tokens, and the row has 30 in all",
    ),
    "step is async": (
        "class Mine(Desk):\n    async def step(self, message): ...",
        "Mine must be a plain function, got an async one",
    ),
    "step of the old gym": (
        STEP.format('return "d", 0.0, False, {}'),
        "must return (observation, reward, terminated, truncated, info), got a tuple of 4",
    ),
    "step returns nothing": (STEP.format("..."), "reward, terminated, truncated, info), got None"),
    "step raises": (
        STEP.format("raise KeyError('x')"),
        "Mine raised KeyError ('x') in step at desk.py, line 14, for the",
    ),
    "step exits": (
        STEP.format("raise SystemExit(1)"),
        "Mine raised SystemExit (1) in step at desk.py, line 14, for the",
    ),
    "a text for a reward": (
        STEP.format('return "d", "good", False, False, {}'),
        "must be a finite number, got 'good'",
    ),
    "NaN for a reward": (
        STEP.format('return "d", float("nan"), False, False, {}'),
        "must be a finite number, got nan",
    ),
    "a reward too large": (STEP.format('return "d", 10**400, False, False, {}'), "must be a finite number, got 1000"),
    "bytes": (STEP.format('return b"d", 0.0, False, False, {}'), "'content', got a value of type bytes"),
    "half a character": (
        STEP.format('return "\\ud800", 0.0, False, False, {}'),
        "'\\ud800' of a conversation holds half",
    ),
    "no end that is told": (
        STEP.format('return "d", 0.0, 1, False, {}'),
        "'terminated' of the environment Mine must be True or False, got 1.",
    ),
    "a message to a text": (
        STEP.format('return {"role": "tool", "content": "d"}, 0.0, False, False, {}'),
        "that is a plain text must be a text, got {'role'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_environment_that_does_not_do_as_it_should(bench, kind):
    lines, said = BROKEN[kind]
    bench.write("desk.py", DESK.rstrip(), lines)
    assert said in bench.refused(*bench.words("--environment desk.py:Mine"))


@pytest.mark.parametrize(
    "message", ['{"role": "tool", "content": 3}', '{"role": None, "content": "d"}', '{"role": "d"}']
)
def test_a_message_that_a_chat_cannot_hold(bench, message):
    bench.write("desk.py", DESK, STEP.format(f"return {message}, 0.0, False, False, {{}}"))
    line = bench.refused(*bench.words("--environment desk.py:Mine --model chatty --data chat.jsonl"))
    assert "must be a text, or for a chat messages with a 'role' and a 'content', got a value of type dict" in line


# plugins


@pytest.fixture
def plugged(bench: Bench) -> Iterator[Bench]:
    before = set(methods.names())
    yield bench
    for name in set(methods.names()) - before:
        methods.forget(name)


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
    "a class": (HEAD + "@method('mine', title='M')\nclass Mine: ...", "A method is built by a function, not by <class"),
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
def test_an_option_that_makes_no_sense(bench, changes, said):
    assert said in bench.refused(*bench.words(f"--method {changes}"))
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("grpo", {"clip": float("nan")}, "Option 'clip' of grpo must be a number, got nan"),
        ("flow-grpo", {"steps": 0}, "Option 'steps' of flow-grpo must be a whole number, at least 1, got 0"),
        ("flow-grpo", {"level": -1}, "Option 'level' of flow-grpo must be a finite number, 0 or more, got -1"),
        ("flow-grpo", {"clip": float("nan")}, "Option 'clip' of flow-grpo must be a number, got nan"),
        ("mix-grpo", {"flash": 2}, "Option 'flash' of mix-grpo must be a number from 0 to 1, got 2"),
        ("alignprop", {"least": 20}, r"DirectReward\.up_to must be at least depth = 20, got 10"),
        ("vespo", {"positive_rate": -1.0}, r"GammaScore\.positive must be \(shape, rate\), both finite and 0 or more, got \(2.0, -1.0\)"),
        ("bnpo", {"kl": -1}, r"Regulariser\.coefficient of a divergence must be 0 or more, got -1, which would drive the policy"),
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
