"""Pipelines learn where they should, and what is saved is what diffusers loads and draws from alike."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPTS, ddim, distance, loaded, noise_for, options, ours, settings_of, theirs
from torch import Tensor

import stepwell
from stepwell import check
from stepwell.check.tolerance import rounding
from stepwell.errors import InputError
from stepwell.process.flow.process import Flow
from stepwell.process.pipeline.build import pipeline
from stepwell.process.pipeline.loading import LORA_FILE
from stepwell.process.pipeline.networks import Base
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

diffusers = pytest.importorskip("diffusers", reason="pipelines need diffusers installed")
pytest.importorskip("peft", reason="adapters need peft installed")

TOLERANCE = rounding(torch.float32, 10_000)  # products on the way through all steps of a small pipeline
ADAPTER = {"r": 3, "lora_alpha": 6}
SLOW = pytest.mark.slow  # one pipeline of each make stays among the quick tests: a U-Net, a transformer


def build(kind: str, folder: Path, **changes: Any) -> Flow:
    return pipeline(folder, **(options(kind) | {"guidance": 2.5, "solver": "sde-flow"} | changes))


def drawn(process: Flow) -> Tensor:
    return ours(process, noise_for())


def diffusers_draw(kind: str, made: Any) -> Tensor:
    """The same by diffusers alone."""
    return theirs(ddim(made) if kind in ("sd", "sdxl") else made, noise_for(), **settings_of(kind))


def red(completions: list[Tensor], **columns: Any) -> list[float]:
    return [float(image[0].mean()) for image in completions]


def trained(process: Flow, out: Path | None, steps: int = 2, kl: float = 0.0, **settings: Any) -> Flow:
    settings = {"learning_rate": 1e-2, "progress": False, "prompts_per_step": 2, "group_size": 4} | settings
    prompts, options = [{"prompt": text} for text in PROMPTS], {"steps": 4, "kl": kl}
    stepwell.train(process, prompts, red, "flow-grpo", options=options, steps=steps, out=out, **settings)
    return process


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=SLOW), pytest.param("sd3", marks=SLOW), "flux"])
def test_a_trained_adapter_is_loaded_by_diffusers_and_by_us(
    pipeline_folder: Callable[..., Path], tmp_path: Path, kind: str
):
    folder, out = pipeline_folder(kind), tmp_path / "run"
    before, process = drawn(build(kind, folder)), build(kind, folder, lora=ADAPTER)
    assert distance(drawn(process), before) == 0.0  # a new adapter changes nothing
    learns = {name for name, p in process.module.named_parameters() if p.requires_grad}
    assert learns
    assert all("lora_" in name for name in learns)
    at_first = {name: p.detach().clone() for name, p in process.module.named_parameters()}
    trained(process, out)
    moved = {name for name, p in process.module.named_parameters() if not torch.equal(p, at_first[name])}
    assert moved
    assert moved <= learns
    after = drawn(process)
    assert distance(after, before) > 10 * TOLERANCE
    made = loaded(kind, folder)
    made.load_lora_weights(out, weight_name=LORA_FILE)
    assert distance(diffusers_draw(kind, made), after) < TOLERANCE
    again = build(kind, folder, lora=out)
    assert distance(drawn(again), after) < TOLERANCE
    assert {name for name, p in again.module.named_parameters() if p.requires_grad} == learns


def test_an_adapter_without_its_scale_would_be_noticed(pipeline_folder: Callable[..., Path], tmp_path: Path):
    """The planted mistake: weights saved without alpha, for which diffusers then takes the rank."""
    folder, process = pipeline_folder("sd"), build("sd", pipeline_folder("sd"), lora=ADAPTER)
    trained(process, None).save(tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        assert file.metadata().keys() > {"format"}
    save_file(weights, tmp_path / LORA_FILE)
    made = loaded("sd", folder)
    made.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    assert distance(diffusers_draw("sd", made), drawn(process)) > TOLERANCE


@pytest.mark.parametrize("kind", [pytest.param("sd", marks=SLOW), "flux"])
def test_a_network_that_learned_as_a_whole_is_a_pipeline_again(
    pipeline_folder: Callable[..., Path], tmp_path: Path, kind: str
):
    folder, out = pipeline_folder(kind), tmp_path / "run"
    before, process = drawn(build(kind, folder)), trained(build(kind, folder), out, learning_rate=1e-3)
    after = drawn(process)
    assert distance(after, before) > 10 * TOLERANCE
    assert distance(diffusers_draw(kind, loaded(kind, out)), after) < TOLERANCE
    assert distance(drawn(build(kind, out)), after) < TOLERANCE
    assert (out / "metrics.jsonl").is_file()  # the run's own files stayed


def test_an_adapter_can_be_merged_or_left_out(pipeline_folder: Callable[..., Path], tmp_path: Path):
    folder = pipeline_folder("sd3")
    before, process = drawn(build("sd3", folder)), trained(build("sd3", folder, lora=ADAPTER), None)
    after = drawn(process)
    process.save(tmp_path / "merged", merged=True)
    process.frozen().save(tmp_path / "base")
    assert distance(drawn(process), after) == 0.0
    pipe = inspect.getclosurevars(process.module.write).nonlocals["loaded"]  # type: ignore[arg-type]
    assert pipe.transformer is process.module.model, "the pipeline keeps no copy of its network"
    assert distance(diffusers_draw("sd3", loaded("sd3", tmp_path / "merged")), after) < TOLERANCE
    assert distance(diffusers_draw("sd3", loaded("sd3", tmp_path / "base")), before) < TOLERANCE
    contents = set()
    for _ in range(10):  # in an order by chance of two entries, ten files would be alike once in 512 runs
        process.save(tmp_path / "adapter")
        contents.add((tmp_path / "adapter" / LORA_FILE).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "adapter" / LORA_FILE, "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("lora", [ADAPTER, None], ids=["adapter", "whole"])
def test_the_frozen_twin_is_the_network_before_training(pipeline_folder: Callable[..., Path], lora: Any):
    process = build("sd", pipeline_folder("sd"), lora=lora)
    before, twin = drawn(process), process.frozen()
    trained(process, None, learning_rate=1e-3 if lora is None else 1e-2)
    assert distance(drawn(twin), before) == 0.0
    assert distance(drawn(process), before) > TOLERANCE
    assert isinstance(twin.module, Base) == (lora is not None)
    rows = rollout(process, [Request(Prompt(0, "a cat"), 2)], Rng(0)).trajectories
    assert process.score(rows, {"kl"}, reference=twin)["kl"][rows.mask].min() > 0


def test_a_run_resumes_bit_for_bit(pipeline_folder: Callable[..., Path], tmp_path: Path):
    """With a reference, which an adapted network does not store a second time."""
    folder = pipeline_folder("sd3")
    for out, steps, resume in (("whole", 3, False), ("parts", 2, False), ("parts", 3, True)):
        trained(build("sd3", folder, lora=ADAPTER), tmp_path / out, steps=steps, kl=0.1, resume=resume)
    whole, parts = (load_file(tmp_path / name / LORA_FILE) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not list((tmp_path / "whole").rglob("reference.safetensors"))


@pytest.mark.parametrize(
    ("kind", "lora"),
    [*(pytest.param(kind, {}, marks=SLOW) for kind in ("sd", "sdxl", "sd3")), ("flux", {}), ("sd", None)],
)
def test_pipelines_keep_the_laws_of_a_process(pipeline_folder: Callable[..., Path], kind: str, lora: Any):
    process = build(kind, pipeline_folder(kind), lora=lora, dtype="float64", steps=2)
    report = check.process(process, ["a cat", "dog"], group=2)
    assert max(report.measured.values()) < report.tolerance


def test_a_failed_save_leaves_what_was_there(
    pipeline_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder("sd"), out)
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fails(self: Any, folder: Path, **settings: Any) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", fails)
    with pytest.raises(InputError, match="no space left"):
        build("sd", out).save(out)
    assert files == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_reward_of_the_image_reaches_the_adapter(pipeline_folder: Callable[..., Path]):
    """Backwards through the autoencoder and the last denoising step, on a path of either kind."""

    def bright(completions: list[Tensor], **columns: Any) -> Tensor:
        return torch.stack([image.mean() for image in completions])

    noise = Rng(5).normal(8, 4, 8, 8)
    for kind in ("sd", "sd3"):
        process = build(kind, pipeline_folder(kind), lora=ADAPTER)
        before = bright(list(process.decoded(ours(process, noise, ["a cat"] * 8)))).mean()
        settings = {"learning_rate": 1e-2, "progress": False, "prompts_per_step": 1, "group_size": 4}
        run = stepwell.train(process, ["a cat"], bright, "draft-k", options={"steps": 4}, steps=8, **settings)
        assert bright(list(process.decoded(ours(process, noise, ["a cat"] * 8)))).mean() > before
        assert all(row["gradient_norm"] > 0 for row in run.history)


def test_half_precision_trains_its_adapter_in_single_precision(pipeline_folder: Callable[..., Path]):
    process = build("sd3", pipeline_folder("sd3"), lora=ADAPTER, dtype="bfloat16")
    learns = [p for p in process.module.parameters() if p.requires_grad]
    assert {p.dtype for p in learns} == {torch.float32}
    assert {p.dtype for p in process.module.parameters() if not p.requires_grad} == {torch.bfloat16}
    trained(process, None)
    assert drawn(process).dtype == torch.float32
    assert all(bool(p.isfinite().all()) for p in learns)


def test_a_run_knows_the_adapter_the_text_encoders_and_the_autoencoder(pipeline_folder: Callable[..., Path], tmp_path):
    """All that decides what is drawn, besides what learns, is in the description that a run is known by."""
    plain = build("sd", pipeline_folder("sd"), lora=ADAPTER).describe()
    assert plain == build("sd", pipeline_folder("sd"), lora=ADAPTER).describe()
    assert plain == json.loads(json.dumps(plain))
    others: dict[str, tuple[str, Any]] = {
        "alpha": ("network", {"lora": ADAPTER | {"lora_alpha": 7}}),
        "stabilised": ("network", {"lora": ADAPTER | {"use_rslora": True}}),
        "negative": ("encode", {"lora": ADAPTER, "negative_prompt": "a stone"}),
    }
    for entry, changes in others.values():
        other = build("sd", pipeline_folder("sd"), **changes).describe()
        assert [name for name in plain if plain[name] != other[name]] == [entry]
    for part, entry in (("text_encoder", "encode"), ("vae", "decode")):
        shutil.copytree(pipeline_folder("sd"), tmp_path / part)
        (file,) = (tmp_path / part / part).glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).flatten()[0] += 1e-3
        save_file(tensors, file, metadata={"format": "pt"})
        other = build("sd", tmp_path / part, lora=ADAPTER).describe()
        assert [name for name in plain if plain[name] != other[name]] == [entry]
