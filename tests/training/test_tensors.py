"""Samples that are tensors: what of them is written down, and that a run of a flow resumes bit for bit."""

from __future__ import annotations

import json
import shutil
import struct
import zlib

import pytest
import torch
from torch import nn

from stepwell.batch import Read
from stepwell.errors import CheckpointError
from stepwell.figures import pictures
from stepwell.objective.policy import Policy
from stepwell.planning.groups import Groups
from stepwell.process.base import Samples
from stepwell.process.flow.build import flow
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.sampling.request import Prompt
from stepwell.training import resume as saved
from stepwell.training.log import RunLog, read_lines
from stepwell.training.loop import train
from stepwell.training.settings import Settings

SAMPLER = {"solver": "sde-flow", "steps": 4}


class Net(nn.Module):
    """A small velocity for states of any shape; `labels` shift it."""

    def __init__(self, size: int):
        super().__init__()
        weight = torch.linspace(-0.4, 0.6, size * size).reshape(size, size)
        self.weight, self.shift = nn.Parameter(weight), nn.Parameter(torch.zeros(3, size))

    def forward(self, x, time, label):
        flat = x.flatten(1) @ self.weight + self.shift[label] + time[:, None]
        return flat.reshape(x.shape)


def process(shape=(2,), **settings):
    decode = torch.sigmoid if len(shape) > 1 else None
    return flow(Net(torch.Size(shape).numel()), shape, steps=3, encode="label", decode=decode, **settings)


def bright(completions):
    return torch.stack([image.double().mean() for image in completions])


@pytest.fixture
def recipe():
    return Recipe(Policy(), Groups(2, 4), epochs=2, minibatches=2, sampler=SAMPLER)


def run(out, recipe, shape=(2,), resume=False, steps=3, evaluation=None, given=None, **settings):
    kept = {"checkpoint_every": 1, "keep": 1000, "learning_rate": 0.05, **settings}
    prompts = [Prompt(i, i) for i in range(3)]
    return train(
        process(shape) if given is None else given,
        recipe,
        prompts,
        Rewards(bright),
        Settings(steps=steps, **kept),
        out=out,
        resume=resume,
        evaluation=evaluation,
    )


def files(folder):
    logs = [folder / name for name in ("metrics.jsonl", "completions.jsonl")] + sorted(folder.glob("samples/*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in logs}


def parameters(run):
    return [parameter.detach().clone() for parameter in run.process.module.parameters()]


@pytest.mark.parametrize(
    "shape", [(2,), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 8, 8), (2, 3, 5)))]
)
def test_a_flow_resumes_bit_for_bit_from_every_update(shape, recipe, tmp_path):
    whole = run(tmp_path / "whole", recipe, shape)
    halves = 0
    for folder in sorted((tmp_path / "whole" / "checkpoints").iterdir())[:-1]:
        cut = tmp_path / folder.name
        shutil.copytree(tmp_path / "whole", cut)
        for other in (cut / "checkpoints").iterdir():
            if other.name > folder.name:
                shutil.rmtree(other)
        halves += (cut / "checkpoints" / folder.name / "samples.safetensors").exists()
        again = run(cut, recipe, shape, resume=True)
        assert all(map(torch.equal, parameters(whole), parameters(again))), folder.name
        assert files(cut) == files(tmp_path / "whole"), folder.name
    assert halves > 0


def test_planted_mistake_samples_of_another_rollout_are_seen(recipe, tmp_path, monkeypatch):
    """What is drawn again after a resume would not be what was logged: the comparison above can fail."""
    whole = run(tmp_path / "whole", recipe, (1, 8, 8))
    cut = tmp_path / "whole" / "checkpoints" / "update-00000002"
    for other in (tmp_path / "whole" / "checkpoints").iterdir():
        if other.name > cut.name:
            shutil.rmtree(other)
    before = files(tmp_path / "whole")
    together = saved._together

    def turned(*parts):
        samples = together(*parts)
        return Samples(samples.values[::-1], samples.columns)

    monkeypatch.setattr(saved, "_together", turned)
    again = run(tmp_path / "whole", recipe, (1, 8, 8), resume=True)
    assert all(map(torch.equal, parameters(whole), parameters(again)))  # samples are only looked at
    assert files(tmp_path / "whole") != before


class Drawing(Policy):
    """A policy gradient whose loss also reads points that it drew for each row, and the reference there."""

    reads = frozenset({Read("reference", "forward")})
    needs = frozenset({"forward"})

    def draw(self, rows, models, rng):
        count, shape = len(rows), rows.action.shape[2:]
        return {"time": rng.uniform(count, 2).float(), "noise": rng.normal(count, 2, *shape).float()}

    def loss(self, batch, targets):
        found = super().loss(batch, targets)
        distance = (batch.scores["forward"] - batch.rows.points["reference_forward"]).square()
        here = distance.flatten(1).mean(1).sum() / batch.counts.rows
        return type(found)(found.value + here, {**found.metrics, "distance": here.detach()})


def test_points_and_the_reference_survive_a_checkpoint(tmp_path):
    """It is taken in the middle of a rollout's updates."""
    settings = {"epochs": 2, "minibatches": 2, "sampler": SAMPLER, "reference": "synced", "sync_every": 1}
    drawing = Recipe(Drawing(), Groups(2, 4), **settings)
    whole = run(tmp_path / "whole", drawing, steps=2)
    assert whole.history[-1]["distance"] > 0
    for name in ("update-00000002", "update-00000005", "update-00000007"):
        cut = tmp_path / name
        shutil.copytree(tmp_path / "whole", cut)
        for other in (cut / "checkpoints").iterdir():
            if other.name > name:
                shutil.rmtree(other)
        again = run(cut, drawing, steps=2, resume=True)
        assert all(map(torch.equal, parameters(whole), parameters(again))), name
        assert files(cut)["metrics.jsonl"] == files(tmp_path / "whole")["metrics.jsonl"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"given": {"guidance": 1.0, "path": "trigonometric"}}, "path was"),
        ({"given": {"predicts": "data"}}, 'predicts was "velocity", now "data"'),
        ({"given": {"solver": "dpmpp-2m"}}, "solver was"),  # evaluation would differ
        ({"sampler": {"solver": "sde-flow", "steps": 4, "level": 0.3}}, "solver was"),
        ({"sampler": {"solver": "sde-flow", "steps": 5}}, "times was"),
    ],
)
def test_another_sampler_is_refused_and_the_same_one_is_not(changed, said, recipe, tmp_path):
    run(tmp_path, recipe, steps=1)
    run(tmp_path, recipe, steps=2, resume=True)
    other = Recipe(Policy(), Groups(2, 4), epochs=2, minibatches=2, sampler=changed.get("sampler", SAMPLER))
    given = process(**changed.get("given", {}))
    with pytest.raises(CheckpointError, match=rf"of another process \(.*{said}.*; resume with the process it was"):
        run(tmp_path, other, steps=3, resume=True, given=given)


def read_png(data):
    """The pixels (H, W, C) of an 8-bit PNG without filters, read by the specification; and its checksums hold."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        content = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + content)
        parts[kind] = content
        place += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    channels = {0: 1, 2: 3}[colour]
    lines = torch.tensor(list(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8).reshape(height, -1)
    assert depth == 8
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7)])
def test_a_png_holds_the_very_pixels(shape):
    image = (torch.arange(torch.Size(shape).numel()).reshape(shape) % 256) / 255.0
    expected = (image * 255).round().to(torch.uint8).reshape(-1, 5, 7).permute(1, 2, 0)
    assert torch.equal(read_png(pictures.png(image)), expected)
    assert torch.equal(read_png(pictures.png((image * 255).round().to(torch.uint8))), expected)


def test_a_png_is_read_by_another_reader():
    import io

    import matplotlib.image

    image = torch.linspace(0, 1, 3 * 9 * 6).reshape(3, 9, 6)
    other = torch.from_numpy(matplotlib.image.imread(io.BytesIO(pictures.png(image)), format="png").copy())
    assert torch.allclose(other.permute(2, 0, 1), (image * 255).round() / 255, atol=1e-6)


def test_what_is_outside_the_range_or_no_number_is_drawn_nonetheless():
    image = torch.tensor([[-1.0, 2.0, float("nan"), 0.5]] * 4)
    assert read_png(pictures.png(image))[0, :, 0].tolist() == [0, 255, 0, 128]


def test_a_grid_shows_every_image_once_at_one_scale():
    images = [torch.full((1, 8, 8), value / 17) for value in range(10)]
    whole = pictures.grid(images)
    assert whole.shape == (1, 2 * 68 + 4, 8 * 68 + 4)  # eight times as large, in rows of eight
    for place in range(10):
        top, left = 4 + place // 8 * 68, 4 + place % 8 * 68
        assert (whole[0, top : top + 64, left : left + 64] == 15 * place).all()
    assert max(pictures.grid([torch.rand(3, 600, 300)]).shape) == 256 + 8


def test_reducing_keeps_the_mean():
    image = torch.rand(3, 512, 256, generator=torch.Generator().manual_seed(0))
    small = pictures.reduced(image, 64)
    assert small.shape == (3, 64, 32)
    assert float((small.mean() - image.double().mean()).abs()) < 1e-12
    assert pictures.reduced(image, 512) is image


def test_completions_say_points_in_numbers_and_images_in_few_words(recipe, tmp_path):
    run(tmp_path / "points", recipe, (2,), steps=1)
    lines = read_lines(tmp_path / "points" / "completions.jsonl")
    assert all(len(line["completion"]) == 2 and isinstance(line["completion"][0], float) for line in lines)
    assert not (tmp_path / "points" / "samples").exists()
    run(tmp_path / "images", recipe, (1, 8, 8), steps=1)
    for line in read_lines(tmp_path / "images" / "completions.jsonl"):
        assert line["completion"].startswith("1×8×8, mean 0.")
        assert line["picture"] == "samples/step-000001.png"


def test_pictures_show_the_logged_rows_at_few_steps_and_the_last(recipe, tmp_path):
    run(tmp_path, recipe, (1, 8, 8), steps=7, checkpoint_every=0)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == [f"step-00000{step}.png" for step in (1, 2, 5, 7)]
    shape = read_png((tmp_path / "samples" / names[0]).read_bytes()).shape
    assert shape == (64 + 8, 4 * 68 + 4, 1)  # the four completions that are logged
    lines = read_lines(tmp_path / "completions.jsonl")
    assert {line["step"] for line in lines if "picture" in line} == {1, 2, 5}


def test_pictures_are_drawn_where_a_run_is_evaluated(recipe, tmp_path):
    run(tmp_path, recipe, (1, 8, 8), steps=4, evaluate_every=3, evaluation=[Prompt(0, 0)], checkpoint_every=0)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == [f"step-00000{step}.png" for step in (1, 2, 3, 4)]


def test_a_resumed_run_drops_the_pictures_of_steps_that_are_lost(recipe, tmp_path):
    run(tmp_path, recipe, (1, 8, 8), steps=3)
    (tmp_path / "samples" / "step-000900.png").write_bytes(b"")
    run(tmp_path, recipe, (1, 8, 8), steps=4, resume=True)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == [f"step-00000{step}.png" for step in (1, 2, 4)]  # as if step 3 had not been a last one


def test_images_that_are_not_logged_cost_nothing(recipe, tmp_path):
    run(tmp_path, recipe, (1, 8, 8), steps=2, completions_logged=0)
    assert not (tmp_path / "samples").exists()


def test_steps_that_are_not_due_draw_nothing(tmp_path, monkeypatch):
    log, drawn, grid = RunLog(tmp_path), [], pictures.grid
    monkeypatch.setattr(pictures, "grid", lambda images: (drawn.append(len(images)), grid(images))[1])
    image = torch.rand(3, 64, 64)
    for step in range(1, 200):
        log.step({"step": step}, {}, [{"step": step, "completion": "", "picture": image}] * 2)
    assert drawn == [2] * 7  # 1, 2, 5, 10, 20, 50, 100
    log.close()
    assert len(drawn) == 8


def test_samples_of_unequal_shape_and_columns_of_tensors_come_back():
    values = [torch.zeros(2), torch.ones(3)]
    samples = Samples(values, {"score": [torch.tensor(1.0), torch.tensor(2.0)], "name": ["a", None]})
    state, tensors = saved._apart(samples)
    assert list(tensors) == ["columns/score"]
    back = saved._together(state, tensors)
    assert all(map(torch.equal, back.values, values))
    assert all(map(torch.equal, back.columns["score"], samples.columns["score"]))
    assert back.columns["name"] == ["a", None]
    json.dumps(saved._apart(Samples(["text"], {}))[0])
