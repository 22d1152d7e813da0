"""A run that is killed at any moment, once or twice, ends byte for byte as the run that was left alone."""

from __future__ import annotations

import json

import pytest
from command_bench import Bench, FlowBench, TalkBench
from kills.lab import campaign

KILLS = 9
SPREAD = "def spread(completions, **_):\n    return [sum(map(ord, text)) / 100 for text in completions]"
"""A reward that tells nearly all samples apart, so that every step learns and a lost weight is seen."""

EVERY = ("--checkpoint-every", "1", "--learning-rate", "0.01")
TWICE = ("--epochs", "2", "--minibatches", "2")
HELD_OUT = ("--evaluation", "data.jsonl", "--evaluate-every", "2")
LANGUAGE = {
    "grpo": ("--steps", "3", *TWICE, *HELD_OUT, *EVERY),
    "ppo": ("--steps", "2", "--method", "ppo", *TWICE, *EVERY),
    "dpo": ("--steps", "3", "--method", "dpo", "--checkpoint-every", "2", "--learning-rate", "0.01"),
    "tree": ("--steps", "2", "--method", "treepo", "--group-size", "4", *EVERY),
    "lora": ("--steps", "2", "--lora-rank", "2", "--set", "kl=0.1", *TWICE, *EVERY),
}


def without_out(words: list[str]) -> list[str]:
    place = words.index("--out")
    return words[:place] + words[place + 2 :]


def words_of(kind, folder, model_folder):
    if kind in LANGUAGE:
        bench = Bench(folder, model_folder("qwen2"), None)
        bench.write("spread.py", SPREAD)
        return bench.words("--reward", "spread.py:spread", *LANGUAGE[kind])
    if kind == "conversation":
        models = {"plain": model_folder("gpt2"), "chatty": model_folder("gpt2", chat=True)}
        changes = "--method turn-ppo --max-turns 2 --steps 2 --checkpoint-every 1 --epochs 2"
        return TalkBench(folder, models, None).words(changes)
    changes = ("--method", "mix-grpo", "--steps", "3", "--checkpoint-every", "1", "--epochs", "2")
    return FlowBench(folder, None).training(*changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LANGUAGE, "conversation", "flow"])
def test_a_killed_run_ends_as_the_whole_one(kind, tmp_path, model_folder, server):
    words = without_out(words_of(kind, tmp_path, model_folder))
    process = server.Process(target=campaign, args=(words, str(tmp_path), KILLS, len(kind)))
    process.start()
    process.join(280)
    assert process.exitcode == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["faults"] == []
    assert result["killed"] >= KILLS
