"""One meaning for each argument: --set is an option, settings are arguments of train and --setting of compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepwell.cli import COMMANDS, main
from stepwell.cli.arguments import flag_names

TASK = """
import stepwell as sw

def longer(completions):
    return [float(len(text)) for text in completions]

@sw.task("tiny")
def tiny(symbols: int = 3) -> sw.Task:
    return sw.Task(
        name="tiny", title="Tiny", description="Grow strings.", rewards=sw.Rewards(longer),
        process=lambda: sw.exact.markov(symbols=symbols, length=4, prompts=6),
        prompts=[sw.Prompt(i, i) for i in range(4)], evaluation=[sw.Prompt(i, i) for i in range(4, 6)],
        settings={"learning_rate": 0.1, "prompts_per_step": 2, "group_size": 4},
    )
"""
TRAIN = ["train", "--model", "m", "--data", "d.jsonl", "--reward", "numeric", "--method", "grpo"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A task that takes no time, in a plugin, and the words that name it."""
    from stepwell.tasks.registry import forget_task

    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    yield ["compare", "tiny", "--plugin", "task.py", "--budget", "2-steps", "--seeds", "1", "--no-progress"]
    forget_task("tiny")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "steps=3"), "--set steps must be written as --steps: it is a setting of the run, not an option of"),
        (("--set", "learning-rate=3"), "--set learning_rate must be written as --learning-rate"),
        (("--setting", "steps=3"), "a setting of the run is an argument of its own, such as --learning-rate 1e-5"),
        (("--clip", "0.1"), "There is no argument '--clip'; did you mean '--set clip=...'?"),
        (("--shuffle",), "There is no argument '--shuffle'; did you mean '--no-shuffle'?"),
        (("--progress",), "There is no argument '--progress'; did you mean '--no-progress'?"),
        (("--disable_tqdm",), "did you mean '--no-progress'?"),
        (("--output_dir", "runs"), "did you mean '--out'?"),
        (("--data.train_files", "x"), "did you mean '--data'?"),
        (("--lora_r", "8"), "did you mean '--lora-rank'?"),
        (("--fsdp", "full_shard"), "a model is not split over them."),
    ],
)
def test_a_name_in_the_wrong_place_is_answered_by_the_right_one(refused, more, said):
    assert said in refused(*TRAIN, *more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "group_size=3"), "--set group_size must be written as --setting group_size=...: it is a setting"),
        (("--setting", "clip=0.1"), "--setting clip must be written as --set clip=...: it is an option of grpo"),
        (("--setting", "symbols=2"), "--setting symbols must be written as --set symbols=...: it is an option of task"),
        (("--learning-rate", "1"), "did you mean '--setting learning_rate=...'?"),
        (("--num_generations", "4"), "did you mean '--setting group_size=...'?"),
        (("--set", "epsilon=1e-4"), "and rloo has none; write it as --methods grpo:epsilon=..."),
    ],
)
def test_a_comparison_tells_options_from_settings(tiny, refused, more, said):
    assert said in refused(*tiny, "--methods", "grpo,rloo", *more)


def test_an_option_of_all_methods_is_set_for_all_of_them(tiny):
    assert main([*tiny, "--methods", "grpo,dr-grpo", "--set", "clip=0.1", "--set", "symbols=2", "--out", "a"]) == 0
    about = json.loads(Path("a/comparison.json").read_text())
    assert [entry["options"] for entry in about["entries"]] == [{"clip": 0.1}] * 2
    assert about["task"]["options"] == {"symbols": 2}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_flag_says_what_the_flag_does(name, capsys, monkeypatch):
    """A switch that is on by itself is shown as --no-..., and its help begins by what holds with it."""
    monkeypatch.setenv("COLUMNS", "400")
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out
    said = {"shuffle": "take the prompts in the order of the data", "progress": "do not show the progress"}
    on = [flag.removeprefix("--no-") for flag in flag_names(COMMANDS[name]) if flag.startswith("--no-")]
    assert set(on) <= set(said)
    for field in on:
        assert f"--no-{field}" in lines
        assert said[field] in lines


def test_without_shuffle_the_prompts_come_in_the_order_of_the_data():
    import stepwell as sw

    def order(shuffle: bool) -> list[int]:
        seen: list[int] = []

        def reward(completions, prompts):
            seen.extend(prompts)
            return [float(len(text)) for text in completions]

        rows = [{"prompt": number} for number in range(6)]
        settings = {"steps": 3, "prompts_per_step": 2, "group_size": 1, "shuffle": shuffle}
        sw.train(sw.exact.markov(symbols=2, length=2, prompts=6), rows, reward, "reinforce", **settings)
        return seen

    assert order(shuffle=False) == [0, 1, 2, 3, 4, 5]
    assert order(shuffle=True) != [0, 1, 2, 3, 4, 5]


def test_a_search_takes_several_words(shown):
    together, apart = (shown("methods", "--search", *words) for words in (["Group Sequence"], ["group", "sequence"]))
    assert together == apart
    assert "gspo" in together
