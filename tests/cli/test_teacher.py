"""A teacher on the command line: learnt from where the method distils, and refused where it would be ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stepwell as sw
from stepwell.cli import main
from stepwell.reward.verifiers import exact_match

ROWS = [{"prompt": f"{letter} b c", "answer": letter} for letter in "abcd"]
SIZES = {"prompts_per_step": 2, "group_size": 2, "steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def models(model_folder: Callable[..., Path]) -> dict[str, Path]:
    """A student and a teacher of one vocabulary."""
    return {"student": model_folder("qwen2"), "teacher": model_folder("qwen2", num_hidden_layers=1)}


@pytest.fixture
def words(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The words of a short distillation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def build(*more: str, method: str = "on-policy-distillation") -> list[str]:
        settings = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
        given = ["--model", str(models["student"]), "--data", "data.jsonl", "--reward", "exact_match", "--out", "run"]
        given += ["--method", method, "--max-new-tokens", "4", "--device", "cpu", "--no-progress"]
        return ["train", *given, *settings, *more]

    return build


def weights(models: dict[str, Path], student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The student's after the same distillation in Python, with these settings of its and the teacher's sampling."""
    process, other = (
        sw.language(models[name], max_new_tokens=4, device="cpu", **options)
        for name, options in (("student", student), ("teacher", teacher))
    )
    sw.train(process, ROWS, exact_match, "on-policy-distillation", teacher=other, **SIZES)
    process.save("python")
    return load_file("python/model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_a_teacher_is_that_of_python(words, models, tmp_path):
    assert main(words("--teacher", str(models["teacher"]))) == 0
    ours = load_file("run/model.safetensors")
    assert same(ours, weights(models, {}, {}))
    assert not same(ours, load_file(models["student"] / "model.safetensors"))
    assert json.loads((tmp_path / "run/run.json").read_text())["teacher"] == str(models["teacher"])


def test_a_teacher_keeps_its_whole_distribution_at_the_same_temperature(words, models):
    """A truncated teacher has no probability for tokens that the student draws."""
    assert main(words("--teacher", str(models["teacher"]), "--top-k", "3", "--temperature", "0.7")) == 0
    ours, student = load_file("run/model.safetensors"), {"top_k": 3, "temperature": 0.7}
    assert same(ours, weights(models, student, {"temperature": 0.7}))
    for wrong in (student, {}):
        assert not same(ours, weights(models, student, wrong))


@pytest.mark.parametrize(
    ("method", "teacher", "said"),
    [
        ("gkd", None, "--teacher must be given for method 'gkd': it is the model to learn from."),
        ("grpo", "teacher", "--teacher must be left out for method 'grpo', which learns from no other model."),
        ("gkd", "my.py:make", "--teacher must be a language model, as --model is, got a model of your own."),
        ("gkd", "my.py", "There is no file 'my.py'; a model of your own is written as my.py:NAME."),
        ("gkd", "./taecher", "There is no model folder './taecher'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(words, models, refused, tmp_path, method, teacher, said):
    more = () if teacher is None else ("--teacher", str(models.get(teacher, teacher)))
    assert said in refused(*words(*more, method=method))
    assert not (tmp_path / "run").exists()


def test_a_comparison_has_no_teacher(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("compare", "mixture", "--methods", "gkd", "--budget", "1-steps", "--out", "compared")
    assert "methods must learn from rewards alone, got 'gkd', which learns from a teacher" in line
    assert not (tmp_path / "compared").exists()


@pytest.mark.parametrize("method", ["gkd", "on-policy-distillation"])
def test_a_method_that_reads_no_reward_runs_without_one(words, models, tmp_path, capsys, method):
    given = words("--teacher", str(models["teacher"]), method=method)
    place = given.index("--reward")
    assert main(given[:place] + given[place + 2 :]) == 0
    printed = capsys.readouterr().out
    assert f"2 steps of {method} without a reward." in printed
    assert json.loads((tmp_path / "run/run.json").read_text())["reward"] == []
    assert (tmp_path / "run/model.safetensors").is_file()


@pytest.mark.parametrize("method", ["kdrl", "pre-dpo", "tgdpo"])
def test_every_other_method_with_a_teacher_runs_from_the_shell(words, models, method):
    assert main(words("--teacher", str(models["teacher"]), method=method)) == 0


def test_an_evaluation_and_weights_need_a_reward(words, models, refused):
    given = words("--teacher", str(models["teacher"]), method="gkd")
    place = given.index("--reward")
    bare = given[:place] + given[place + 2 :]
    said = refused(*bare, "--evaluation", "data.jsonl", "--evaluate-every", "1")
    assert "--reward must be given with --evaluation, which is the mean reward of its prompts." in said
    assert "--reward-weights needs --reward." in refused(*bare, "--reward-weights", "1")
