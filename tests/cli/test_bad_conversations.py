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
        ("--environment desk.py", "'desk.py' has to name a file and a class or function in it, such as 'my.py:Env"),
        ("--environment =", "The environment '' has to name a file and a class or function in it"),
        ("--environment dsk.py:Desk", "There is no file 'dsk.py'; did you mean 'desk.py'?"),
        ("--environment no.such:Desk", "There is no module 'no.such'; a file is named with its ending"),
        ("--environment data.jsonl:Desk", "The environment's file 'data.jsonl' is no Python file"),
        ("--environment desk.py:Deks", "no class or function of desk.py named 'Deks'; did you mean 'Desk'?"),
        ("--environment desk.py:GOOD", "'GOOD' in desk.py is of type tuple; a class or function is right."),
        ("--envronment desk.py:Desk", "There is no argument '--envronment'; did you mean '--environment'?"),
        ("--max-turns 0", "max_turns=0 is not a whole number from 1 upwards"),
        ("--max-turns 2.5", "--max-turns has a value that does not fit"),
        ("--turn-stop =", "stop=('',) is not a text, nor texts, that end a turn"),
        ("--turn-role tool", "--turn-role is the role of a chat's messages, and no prompt is a chat; leave it out."),
        ("--turn-role = --model chatty --data chat.jsonl", "role='' is not the name of a chat's role"),
        ("--environment - --reward exact_match", "--turn-stop is about conversations; name what is talked to"),
        ("--environment - --turn-stop - --max-turns 8", "--max-turns is about conversations; name what is talked to"),
        ("--environment - --turn-stop - --turn-role tool", "--turn-role is about conversations; name what is talked"),
        ("--environment - --turn-stop -", "There is nothing to learn from; give --reward my.py:function"),
        (
            "--environment - --turn-stop - --reward environment_return",
            "The reward 'environment_return' is what an environment pays; name one with --environment.",
        ),
        ("--reward environment_retur", "no reward 'environment_retur'; did you mean 'environment_return'?"),
        ("--reward-weights 1 2", "2 reward weights for 1 functions (environment_return)"),
        ("--method flow-grpo", "The method 'flow-grpo' trains flows, and not language models"),
        ("--method grpo:clip=0.1", "options have their own argument, --method grpo --set clip=0.1."),
        ("--data chat.jsonl --method turn-ppo", "is a chat, but the tokenizer has no chat template; give a text."),
        ("--data half.jsonl", "half.jsonl, row 0: The prompt 'a \\ud800' holds half a character"),
        ("--data turns.jsonl", "The data has a column 'turns', which is what reward functions are given"),
        ("--data environment_return.jsonl", "The data has a column 'environment_return', which is what reward"),
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
        assert f"--environment has no meaning for {called}; leave it out." in line
        line = bench.refused(*bench.words(f"{bare} --model {model} --environment - --max-turns 2"))
        assert f"--max-turns has no meaning for {called}; leave it out." in line


# the user's file


BROKEN = {
    "syntax": ("def f(:", "desk.py failed at line 13 while it was imported: SyntaxError"),
    "raises": ("1 / 0", "desk.py failed at line 13 while it was imported: ZeroDivisionError"),
    "exits": ("raise SystemExit(3)", "desk.py failed at line 13 while it was imported: SystemExit: 3"),
    "an object": ("Mine = Desk()", "'Mine' in desk.py is of type Desk; a class or function is right."),
    "needs arguments": (
        "class Mine(Desk):\n    def __init__(self, size): ...",
        "'desk.py:Mine' takes the arguments (size); environments are made by a class or a function that needs none.",
    ),
    "function needs arguments": ("def Mine(size): ...", "'desk.py:Mine' takes the arguments (size)"),
    "function returns nothing": ("def Mine(): ...", "The environment's factory returned None, which has no method"),
    "one for all": ("one = Desk()\ndef Mine(): return one", "factory returned the same Desk twice; a new one each"),
    "maker raises": (
        "class Mine(Desk):\n    def __init__(self): self.x = 1 / 0",
        "Mine raised ZeroDivisionError (division by zero) in the environment's factory at desk.py, line 14, for",
    ),
    "no reset": ("class Mine:\n    def step(self, message): ...", "a value of type Mine, which has no method 'reset'"),
    "no step": ("class Mine:\n    def reset(self, prompt): ...", "a value of type Mine, which has no method 'step'"),
    "step takes nothing": (
        "class Mine(Desk):\n    def step(self): ...",
        "is called as step(message), which () does not",
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
        "The reset of the environment Mine takes the column 'answer' first, where it is given the prompt;",
    ),
    "reset takes keywords only": (
        RESET.format("(self, *, seed=None): ..."),
        "is called as reset(prompt, **columns), which (*, seed=None) does not take",
    ),
    "reset is async": (
        "class Mine(Desk):\n    async def reset(self, prompt): ...",
        "The reset of the environment Mine is",
    ),
    "reset returns a number": (RESET.format("(self, prompt): return 3"), "returned 3 as the observation of reset"),
    "reset says too much": (
        RESET.format("(self, prompt): return 'a ' * 40"),
        "take 40 tokens, and the row has 30 in all",
    ),
    "step is async": (
        "class Mine(Desk):\n    async def step(self, message): ...",
        "Mine is async, and environments are not",
    ),
    "step of the old gym": (
        STEP.format('return "d", 0.0, False, {}'),
        "Mine returned 4 values from step; (observation,",
    ),
    "step returns nothing": (STEP.format("..."), "Mine returned None from step; (observation, reward, terminated"),
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
        "the reward 'good'; a finite number is",
    ),
    "NaN for a reward": (
        STEP.format('return "d", float("nan"), False, False, {}'),
        "the reward nan; a finite number is",
    ),
    "a reward too large": (STEP.format('return "d", 10**400, False, False, {}'), "a finite number is right."),
    "bytes": (STEP.format('return b"d", 0.0, False, False, {}'), "type bytes as the observation of step"),
    "half a character": (
        STEP.format('return "\\ud800", 0.0, False, False, {}'),
        "'\\ud800' of a conversation holds half",
    ),
    "no end that is told": (
        STEP.format('return "d", 0.0, 1, False, {}'),
        "returned terminated=1; True or False is right.",
    ),
    "a message to a text": (
        STEP.format('return {"role": "tool", "content": "d"}, 0.0, False, False, {}'),
        "answers a plain text with the message",
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
    assert "returned a value of type dict as the observation of step; a text, or for a chat messages" in line


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
        "The id of a method is 3; a text without spaces,",
    ),
    "id of two words": (
        MINE.replace("'mine'", "'my own'").format("", "", GOOD),
        "The id of a method is 'my own'; a text",
    ),
    "id with a comma": (
        MINE.replace("'mine'", "'a,b'").format("", "", GOOD),
        "The id of a method is 'a,b'; a text without",
    ),
    "no default": (
        MINE.format("", "clip", GOOD),
        "Option 'clip' of method 'mine' has no default; every option needs one.",
    ),
    "any options": (MINE.format("", "**options", GOOD), "Option 'options' of method 'mine' has no default"),
    "a class": (HEAD + "@method('mine', title='M')\nclass Mine: ...", "A method is built by a function, not by <class"),
    "unknown room": (
        MINE.format(", room='langauge'", "", GOOD),
        "no room for method 'mine' 'langauge'; did you mean 'lan",
    ),
    "unknown entry": (
        MINE.format(", papr='x'", "", GOOD),
        "no entry of the card of 'mine' named 'papr'; did you mean 'pap",
    ),
    "proof as a text": (
        MINE.format(", proof='tree'", "", GOOD),
        "The proof of method 'mine' is 'tree'; a tuple of oracles",
    ),
    "no recipe": (MINE.format("", "", "return 3"), "The method 'mine' is no Recipe but int; return a Recipe."),
    "nothing": (MINE.format("", "", "..."), "The method 'mine' is no Recipe but NoneType; return a Recipe."),
    "async": (MINE.replace("def", "async def").format("", "", GOOD), "The method 'mine' is no Recipe but coroutine"),
    "fails": (MINE.format("", "", "1 / 0"), "'mine' cannot be built; its function failed at line 6: ZeroDivisionError"),
    "fails with an option": (
        MINE.format("", "size=1", "1 / (size - 2)"),
        "'mine' cannot be built with size=2; its function failed at line 6: ZeroDivisionError: division by zero.",
    ),
    "recipe of a number": (
        MINE.format("", "", "return Recipe(3)"),
        "The objective of a recipe is 3; a Term, such as Pol",
    ),
    "number for a part": (
        MINE.format("", "", "return Recipe(Policy(ratio=3))"),
        "'ratio' of Policy is 3; a Ratio is right.",
    ),
    "unknown part": (
        MINE.format("", "", "return get('rloo').recipe().replace(rati=3)"),
        "There is no part 'rati'; did you mean 'ratio'?",
    ),
    "unknown name in a recipe": (
        MINE.format("", "", "return Recipe(Policy(), reference='synked')"),
        "There is no 'reference' of Recipe 'synked'; did you mean 'synced'?",
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
        ("grpo --set clip=wide", "Option 'clip' of grpo is a number, not 'wide'."),
        ("grpo --set clip=nan", "Option 'clip' of grpo is a number, not 'nan'."),
        ("grpo --set clip=none", "Option 'clip' of grpo is a number, not 'None'."),
        ("grpo --set clp=0.1", "There is no option of grpo 'clp'; did you mean 'clip'?"),
        ("grpo --set kl=-1", "'kl' of grpo is -1; a finite number from 0 on is right."),
        ("grpo --set kl=1e999", "'kl' of grpo is inf; a finite number from 0 on is right."),
        ("grpo --set epsilon=-1", "'epsilon' of grpo is -1; a finite number from 0 on is right."),
        ("turn-ppo --set gamma=2", "'gamma' of GeneralisedAdvantage is 2; a number from 0 to 1 is right."),
        ("turn-ppo --set lam=-0.1", "'lam' of GeneralisedAdvantage is -0.1; a number from 0 to 1 is right."),
        ("turn-ppo --set epochs=0", "There are 0 epochs of 2 minibatches; 1 or more is right."),
        ("turn-ppo --set epochs=1.5", "Option 'epochs' of turn-ppo is a whole number, not '1.5'."),
        ("turn-ppo --minibatches 3", "There are 3 minibatches for 2 prompts a step; at most one each."),
        ("ppo --set value_coefficient=-1", "'coefficient' of ValueLoss is -1; a finite number from 0 on is right."),
        ("opo --set variant=publishd", "There is no 'variant' of opo 'publishd'; did you mean 'published'?"),
        ("otb --set variant=3", "Option 'variant' of otb is a text, not '3'."),
        (
            "iterative-dpo --set reference=strat",
            "There is no 'reference' of iterative-dpo 'strat'; did you mean 'start'?",
        ),
        ("dpo --set loss=sigmoi", "There is no preference loss 'sigmoi'; did you mean 'sigmoid'?"),
        ("dpo --set beta=0", "'beta' of Logistic is 0; a finite number above 0 is right."),
        ("dpo --set smoothing=0.7", "'smoothing' of Logistic is 0.7; a number from 0 to 1/2 is right."),
        ("slic --set margin=0", "'margin' of slic is 0; a finite number above 0 is right."),
        ("vargrad --set beta=-1", "'beta' of vargrad is -1; a finite number above 0 is right."),
        ("treepo --set segment=0", "'segment' of SegmentTree is 0; a whole number from 1 on is right."),
        ("treepo --set depth=0", "'depth' of treepo is 0; a whole number from 1 on is right."),
        ("vineppo --set vines=-1", "'vines' of Vines is -1; a whole number from 1 on is right."),
        ("high-entropy --set top=0", "'top' of HighEntropy is 0; a number above 0 and at most 1 is right."),
        ("thr --set p=2", "'p' of HiddenReward is 2; a number from -1 to 1 is right."),
        ("rl-plus --set share=2", "The weights of a mixture are [-1, 2]; 0 or more each, and 1 together, is right."),
        ("d3s --set rows=-1", "'share' of MostSpread is -1; a number above 0 and at most 1 is right."),
        ("dual-clip --set c=0.5", "The bound of a dual clip is 0.5 ('dual'); above 1 is right"),
        ("two-sided-clip --set delta=1", "The ratio is capped at 1 ('delta'), where it is clipped at 1 + 0.2 already"),
        ("dapo --set refill=0", "'limit' of DynamicSampling is 0; a number from 1 on is right."),
        ("dapo --set buffer=-1", "'buffer' of Overlong is -1; a number above 0 and at most 1 is right."),
    ],
)
def test_an_option_that_makes_no_sense(bench, changes, said):
    assert said in bench.refused(*bench.words(f"--method {changes}"))
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("grpo", {"clip": float("nan")}, "Option 'clip' of grpo is a number, not 'nan'"),
        ("flow-grpo", {"steps": 0}, "'steps' of flow-grpo is 0; a whole number from 1 on is right"),
        ("flow-grpo", {"level": -1}, "'level' of flow-grpo is -1; a finite number from 0 on is right"),
        ("flow-grpo", {"clip": float("nan")}, "'low' of Clip is nan; a finite number is right"),
        ("mix-grpo", {"flash": 2}, "'flash' of mix-grpo is 2; a number from 0 to 1 is right"),
        ("alignprop", {"least": 20}, "A depth from 20 to 10 steps is none"),
        ("vespo", {"positive_rate": -1.0}, r"The shape and the rate of GammaScore are \(2.0, -1.0\) \('positive'\)"),
        ("bnpo", {"kl": -1}, "The coefficient of a divergence is -1, which would drive the policy away; 0 or more is"),
        ("constrained-rlhf", {"price": -1}, "'initial' of Multiplier is -1; a finite number from 0 on is right"),
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
