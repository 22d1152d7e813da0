"""A flow on the command line: its sampler is the method's where that chooses one, and it may need no prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepwell.cli import main

NETWORK = """
import torch
import stepwell as sw

def near(completions):
    return -torch.stack(list(completions)).flatten(1).square().sum(1)

class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x, t, label=None):
        return self.linear(x)

def make():
    torch.manual_seed(0)
    return sw.flow(Field(), shape=(2,), path="linear", steps=6)

def told():
    return sw.flow(Field(), shape=(2,), path="linear", steps=6, encode=lambda prompts: {"label": torch.tensor(prompts)})
"""
SIZES = ["--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--no-progress", "--out", "run"]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The words of a run of a flow without conditions, and without data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    return lambda *more, model="make": ["train", "--model", f"net.py:{model}", "--reward", "net.py:near", *SIZES, *more]


def options(out: str = "run") -> dict:
    return json.loads(Path(out, "run.json").read_text())["options"]


@pytest.mark.parametrize("method", ["flow-grpo", "draft-k"])
def test_a_flow_without_conditions_needs_no_data(words, method):
    assert main(words("--method", method)) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1


def test_a_flow_with_conditions_needs_data(words, refused):
    assert "--data must be given: this model is conditioned on prompts." in refused(
        *words("--method", "flow-grpo", model="told")
    )
    assert not Path("run").exists()


def test_a_language_model_needs_data(words, refused):
    line = refused("train", "--model", "some/model", "--reward", "numeric", "--method", "grpo")
    assert "--data must be given: a language model is trained on prompts." in line


def test_in_python_too_prompts_may_be_none(words, monkeypatch):
    import stepwell as sw
    from stepwell.reward.loading import load_function

    process, near = load_function("net.py:make")(), load_function("net.py:near")
    run = sw.train(process, None, near, "flow-grpo", steps=1, prompts_per_step=1, group_size=2)
    assert run.steps == 1


def test_the_sampler_that_is_given_is_the_methods_own(words):
    assert main(words("--method", "flow-grpo", "--solver-steps", "4")) == 0
    assert options() == {"steps": 4}
    assert "steps=4" in json.loads(Path("run/run.json").read_text())["parts"]


def test_a_solver_by_name_is_the_methods_own(words):
    assert main(words("--method", "draft-k", "--solver", "dpmpp-2m", "--solver-steps", "3")) == 0
    assert options() == {"solver": "dpmpp-2m", "steps": 3}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--solver", "heun"), "--solver must be left out for method 'flow-grpo', which chooses its own; it draws"),
        (("--times", "1", "0.5", "0"), "--times must be left out for method 'flow-grpo', which chooses its own"),
        (("--level", "0.5"), "--level must be left out for method 'flow-grpo', which chooses its own; set it by --set"),
        (("--shift", "3"), "--shift must be left out for method 'flow-grpo', which chooses its own"),
        (("--solver-steps", "4", "--set", "steps=5"), "--solver-steps must be left out for method 'flow-grpo'"),
    ],
)
def test_a_sampler_that_would_be_ignored_is_refused(words, refused, more, said):
    assert said in refused(*words("--method", "flow-grpo", *more))
    assert not Path("run").exists()
