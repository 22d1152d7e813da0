"""The command on each card, typed as it stands in a folder with small models, data and rewards, trains."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from stepwell import methods
from stepwell.cli import main

REWARDS = """
import torch

def reward(completions, **columns):
    if isinstance(completions[0], torch.Tensor):
        return -torch.stack(list(completions)).flatten(1).square().sum(1)
    return [float(text.count("a")) for text in completions]

def reward_2(completions, **columns):
    return [float(len(text) % 3) for text in completions]
"""
NETWORK = """
import torch
import stepwell as sw

def make():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(torch.cat([x, t.expand(len(x))[:, None].to(x)], 1))

    return sw.flow(Field(), shape=(2,), path="linear", steps=10)
"""
SMALL = ["--steps", "1", "--prompts-per-step", "4", "--no-progress"]
WORDS = ["--max-new-tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    rows = [{"prompt": f"{letter} b c", "demonstration": "a a", "hinted": f"{letter} a a"} for letter in "abcdefgh"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.py").write_text(REWARDS)
    (folder / "net.py").write_text(NETWORK)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_the_command_of_a_card_trains(
    name: str, folder: Path, tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = methods.get(name)
    text = "language" in card.processes
    model = str(model_folder("qwen2")) if text else "net.py:make"
    monkeypatch.chdir(folder)
    _, *words = shlex.split(card.command.replace("DIR_OR_ID", model).replace("runs/a", str(tmp_path / "run")))
    assert main([*words, *SMALL, *(WORDS if text else [])]) == 0
    (metrics,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics["updates"] >= 1
