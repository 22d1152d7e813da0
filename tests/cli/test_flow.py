"""Flows on the command line and in the few functions most users call: what is drawn is what is written and counted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import stepwell as sw
from stepwell.cli import main
from stepwell.cli.processes.solver import solver_from
from stepwell.errors import InputError, StepwellError
from stepwell.solver.table import TABLES


def neighbour(name: str) -> Any:
    """A module beside the tests."""
    place = Path(__file__).parents[1] / name
    specification = importlib.util.spec_from_file_location(place.stem, place)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a user's file."""
    monkeypatch.chdir(tmp_path)
    neighbour("flow_models.py").write_file(tmp_path)
    return tmp_path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a command, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return run


def velocity(x, t):
    return x * (2 * t - 1) / (t * t + (1 - t) ** 2)


POINTS = ("sample", "--model", "my.py:velocity", "--shape", "2")


# solvers


def test_every_solver_is_listed_with_what_it_is(shown):
    printed = shown("solvers")
    listed = json.loads(shown("solvers", "--json"))
    assert [row["name"] for row in listed] == list(TABLES) == list(sw.solvers())
    for table in TABLES.values():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [table.name])
        assert line.split()[1:4] == [str(table.order), str(table.evaluations), table.noise]
        assert table.source in line


def test_a_solver_is_printed_with_every_setting(shown):
    printed = shown("solvers", "unipc-2")
    settings = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert {name: f"{value}" for name, value in asdict(TABLES["unipc-2"]).items()} == {
        name: value.strip() for name, value in settings.items()
    }


@pytest.mark.parametrize("name", TABLES)
def test_a_saved_solver_is_read_back_as_it_was(shown, folder, name):
    shown("solvers", name, "--save", "mine.json")
    assert solver_from("mine.json") == TABLES[name]
    assert json.loads(shown("solvers", "mine.json", "--json")) == json.loads(shown("solvers", name, "--json"))


def test_an_edited_solver_draws_what_its_table_says(shown, folder):
    """ddim-eta at level 1 is ddpm; at its own level 0.5 it is not."""
    shown("solvers", "ddim-eta", "--save", "mine.json")
    shown(*POINTS, "--solver", "mine.json", "--out", "before")
    edited = json.loads((folder / "mine.json").read_text()) | {"level": 1.0}
    (folder / "mine.json").write_text(json.dumps(edited))
    shown(*POINTS, "--solver", "mine.json", "--out", "after")
    shown(*POINTS, "--solver", "ddpm", "--out", "ddpm")
    before, after, ddpm = (np.load(f"{name}/samples.npy") for name in ("before", "after", "ddpm"))
    assert np.array_equal(after, ddpm)
    assert not np.array_equal(before, ddpm)


# sample


@pytest.mark.parametrize(("solver", "calls"), [("euler", 7), ("heun", 13), ("dpmpp-2m", 7), ("ddpm", 7)])
def test_what_is_written_is_what_was_drawn_and_counted(shown, folder, solver, calls):
    """A step costs one evaluation; Heun's cost two, but for the last, which ends where the velocity is not asked."""
    words = (*POINTS, "--solver", solver, "--steps", "7", "--samples", "5", "--seed", "3")
    printed = shown(*words, "--out", "a")
    shown(*words, "--format", "safetensors", "--out", "b")
    drawn = sw.sample(sw.flow(velocity, (2,)), n=5, seed=3, solver=solver, steps=7)
    assert np.array_equal(np.load("a/samples.npy"), torch.stack(drawn.values).numpy())
    assert torch.equal(load_file("b/samples.safetensors")["samples"], torch.stack(drawn.values))
    assert drawn.cost.model_evaluations == 5 * calls
    assert next(line for line in printed.splitlines() if line.split()[:1] == [solver]).split()[1:5] == [
        "7",
        "5",
        str(5 * calls),
        str(calls),
    ]
    about = json.loads((folder / "a" / "samples.json").read_text())
    assert about["solver"] == solver
    assert about["cost"]["model_evaluations"] == 5 * calls
    assert len(about["times"]) == 8
    assert about["samples"] == [{"prompt": None}] * 5
    assert sorted(path.name for path in folder.glob("a/*")) == ["samples.json", "samples.npy"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "_") == ["a", "b"]


def test_the_seed_decides_every_byte(shown, folder):
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        shown(*POINTS, "--solver", "ddpm", "--seed", seed, "--out", out)
    contents = {out: [path.read_bytes() for path in sorted((folder / out).iterdir())] for out in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"][1] != contents["c"][1]


def test_prompts_are_told_under_the_name_that_is_given(shown, folder):
    """The mean of 400 samples of N(label, 1) is within four standard errors of 0.05; the labels are 6 apart."""
    shown(*POINTS[:2], "my.py:labelled", "--shape", "1", "--encode", "label", "--prompt", "-3", "--prompt", "3",
          "--samples", "400", "--steps", "40", "--solver", "dpmpp-2m", "--out", "a")  # fmt: skip
    drawn = np.load("a/samples.npy")
    assert drawn.shape == (800, 1)
    assert abs(drawn[:400].mean() + 3) < 0.2
    assert abs(drawn[400:].mean() - 3) < 0.2
    prompts = [row["prompt"] for row in json.loads((folder / "a/samples.json").read_text())["samples"]]
    assert prompts == [-3] * 400 + [3] * 400


def test_images_are_written_to_the_nearest_of_256_levels(shown, folder):
    from PIL import Image

    shown("sample", "--model", "my.py:make_images", "--samples", "3", "--seed", "5", "--out", "a")
    drawn = sw.sample(sw.flow(velocity, (3, 8, 8), decode=lambda x: x.sigmoid()), n=3, seed=5)
    names = ["grid.png", "sample-0000.png", "sample-0001.png", "sample-0002.png", "samples.json"]
    assert sorted(path.name for path in (folder / "a").iterdir()) == names
    for row, value in enumerate(drawn.values):
        with Image.open(f"a/sample-{row:04d}.png") as image:
            assert np.array_equal(np.asarray(image), (value * 255).round().numpy().transpose(1, 2, 0))
    files = [row["file"] for row in json.loads((folder / "a/samples.json").read_text())["samples"]]
    assert files == names[1:4]


def test_pictures_with_values_outside_their_range_are_arrays():
    image = torch.full((3, 8, 8), 0.5)
    from stepwell.sampling.export import format_for

    assert format_for([image, image]) == "png"
    assert format_for([image, image + 0.6]) == "npy"
    with pytest.raises(InputError, match="must be images with values from 0 to 1"):
        format_for([image - 0.6], "png")


def test_without_a_folder_no_other_is_overwritten(shown, folder):
    for _ in range(2):
        shown(*POINTS)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["sample", "sample-2"]


def test_a_drawing_that_fails_leaves_no_folder_behind(capsys, folder):
    before = sorted(folder.iterdir())
    assert main([*POINTS[:2], "my.py:not_a_number", "--shape", "2"]) == 2
    assert main([*POINTS[:2], "my.py:not_a_number", "--shape", "2", "--out", "some/where"]) == 2
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_a_disk_that_is_full_leaves_nothing_of_the_samples(capsys, folder, monkeypatch):
    import errno
    import os

    write, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        calls.append(path)
        if path.name == "samples.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    before = sorted(folder.iterdir())
    assert main([*POINTS, "--out", "a"]) == 2
    assert "There is no space left to write 'a'" in capsys.readouterr().err
    assert any(path.name == "samples.npy" for path in calls)
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_a_task_s_start_can_be_drawn_from(shown, folder):
    from stepwell.tasks.registry import get_task

    printed = shown("sample", "--task", "mixture", "--set", "modes=3", "--steps", "4", "--samples", "6", "--out", "a")
    process = get_task("mixture", modes=3).process()
    expected = sw.sample(process, n=6, steps=4)
    assert np.array_equal(np.load("a/samples.npy"), torch.stack(expected.values).numpy())
    assert "24" in printed.split()  # six samples of four steps


# train


def test_a_network_of_one_s_own_learns_and_is_drawn_from_again(shown, folder):
    """The reward is the first coordinate; rows of data need no prompt, and the run's folder is what sample reads."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"weight": number}) + "\n" for number in range(4)))
    shown("train", "--model", "my.py:network", "--shape", "2", "--data", "rows.jsonl", "--reward", "my.py:pull",
          "--method", "draft-k", "--steps", "30", "--learning-rate", "0.05", "--solver-steps", "5",
          "--prompts-per-step", "4", "--group-size", "4", "--no-progress", "--out", "run")  # fmt: skip
    correction = load_file("run/model.safetensors")["correction"]
    assert correction[0] < -0.1  # the velocity points from the data to the noise
    assert abs(correction[1]) < 1e-6
    about = json.loads((folder / "run/run.json").read_text())
    assert (about["shape"], about["solver_steps"]) == ([2], 5)
    assert "temperature" not in about
    for out, more in (("a", []), ("b", ["--weights", "run"])):
        shown("sample", "--model", "my.py:make", "--samples", "8", *more, "--out", out)
    moved = np.load("b/samples.npy") - np.load("a/samples.npy")
    assert (moved[:, 0] > 0.1).all()
    assert np.abs(moved[:, 1]).max() < 1e-5


def test_a_pipeline_is_trained_by_adapter_and_drawn_from_with_it(shown, folder):
    neighbour("process/pipeline/tiny_pipelines.py").write("sd", folder / "sd")
    (folder / "rows.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a cab"}\n')
    shown("train", "--model", "sd", "--data", "rows.jsonl", "--reward", "my.py:dark", "--method", "flow-grpo",
          "--lora", "--guidance", "1", "--steps", "1", "--learning-rate", "0.1", "--prompts-per-step", "2",
          "--group-size", "2", "--device", "cpu", "--no-progress", "--out", "run")  # fmt: skip
    words = ("sample", "--pipeline", "sd", "--prompt", "a cat", "--prompt", "a dog", "--samples", "1", "--steps", "2",
             "--guidance", "1", "--device", "cpu", "--format", "npy")  # fmt: skip
    shown(*words, "--out", "a")
    printed = shown(*words, "--lora", "run", "--out", "b")
    assert np.load("a/samples.npy").shape == (2, 3, 16, 16)
    assert not np.array_equal(np.load("a/samples.npy"), np.load("b/samples.npy"))
    assert "ddim" in printed
    shown("export", "run", "--out", "taken", "--adapter")
    adapters = [next((folder / place).glob("*.safetensors")).read_bytes() for place in ("run", "taken")]
    assert adapters[0] == adapters[1]


# in Python


class Moved(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.correction = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, t):
        return velocity(x, t[:, None]) + self.correction


@pytest.mark.parametrize("prompts", [[None] * 4, [1, 2, 3, 4], [{"label": 1}, {"label": 2}], ["a", "b"]])
def test_prompts_of_a_flow_may_be_anything(prompts):
    process = sw.flow(Moved(), (2,))
    seen: list[Any] = []

    def reward(prompts, completions, label=None):
        seen.extend(prompts if label is None else label)
        return [0.0 for _ in completions]

    sw.train(process, prompts, reward, "flow-grpo", steps=1, prompts_per_step=2, group_size=2)
    values = [row["label"] if isinstance(row, dict) else row for row in prompts]
    assert len(seen) == 4
    assert set(seen) <= set(values)


def test_samples_know_their_prompts_and_cost_what_they_alone_cost():
    process = sw.flow(lambda x, t, label: velocity(x, t) + 0 * label[:, None], (2,), encode="label", steps=3)
    sw.sample(process, [7], n=10)
    drawn = sw.sample(process, [1, 2], n=6, rows_at_once=4)
    assert drawn.prompts == [1] * 6 + [2] * 6
    assert drawn.cost.model_evaluations == 12 * 3
    assert process.meter.read().model_evaluations == (10 + 12) * 3
    assert len(drawn) == 12


def test_samples_are_those_of_a_rollout_with_the_same_seed():
    process = sw.flow(velocity, (2,), solver="ddpm", steps=3)
    drawn = sw.rollout(process, [sw.Request(sw.Prompt(0, None), 4)], sw.Rng(11))
    for mine, theirs in zip(sw.sample(process, n=4, seed=11).values, drawn.samples.values, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda flow: sw.sample(flow, solver="eulr"), "no solver 'eulr'; did you mean 'euler'"),
        (lambda flow: sw.sample(flow, sover="euler"), "'sover'; did you mean 'solver'"),
        (lambda flow: sw.sample(flow, n=0), "n must be a whole number of at least 1, got 0"),
        (lambda flow: sw.sample(flow, seed="x"), "seed must be a whole number of 64 bits, got 'x'"),
        (lambda flow: sw.sample(velocity), "The model to sample must be a process"),
        (lambda flow: sw.sample(flow, times=[1.0, 0.2]), "times must end at 0"),
        (lambda flow: sw.sample(flow, []), "holds no rows"),
        (lambda flow: sw.sample(flow, 3), "a list of rows, got an object of type int"),
        (lambda flow: sw.sample(sw.exact.markov(), [0], steps=3), "'steps' needs a process with with_sampler"),
        (lambda flow: sw.train(flow, [None], len, "flow-grpo"), "no parameter that can learn"),
        (lambda flow: sw.train(flow, [None], len, "grpo"), "'grpo' trains language models, and not flows"),
        (lambda flow: sw.train(sw.exact.markov(), [{"prompt": 0}], len, "flow-grpo"), "trains flows, and not language"),
        (lambda flow: sw.sample(flow).save(__file__), "is a file where a folder is needed"),
        (lambda flow: sw.sample(flow).save("x", format="jpg"), "no format of samples 'jpg'"),
    ],
)
def test_what_cannot_be_is_one_sentence_in_python_too(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StepwellError) as caught:
        call(sw.flow(velocity, (2,)))
    assert said in str(caught.value)


def test_a_user_s_encoding_that_fails_names_the_row():
    def encode(prompts):
        return {"label": torch.tensor([{"cat": 0}[prompt] for prompt in prompts])}

    process = sw.flow(lambda x, t, label: x, (2,), encode=encode)
    with pytest.raises(InputError, match=r"The list of prompts, row 1: The flow's encode cannot read 'dog': KeyError"):
        sw.sample(process, ["cat", "dog"])
