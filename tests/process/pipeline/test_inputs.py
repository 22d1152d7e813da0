"""What is wrong with a pipeline or its options is said in one sentence, before anything is drawn."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import noise_for, options, tiny, unet

from stepwell.errors import InputError, StepwellError
from stepwell.process.flow.process import Flow
from stepwell.process.pipeline.build import pipeline
from stepwell.process.pipeline.loading import LORA_FILE, shift_of
from stepwell.rng import Rng

diffusers = pytest.importorskip("diffusers", reason="pipelines need diffusers installed")

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy_of(pipeline_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own to break."""
    return lambda kind: Path(shutil.copytree(pipeline_folder(kind), tmp_path / kind))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(folder: Any, match: str, kind: str = "sd", **changes: Any) -> None:
    with pytest.raises(InputError, match=match) as found:
        pipeline(folder, **(options(kind) | changes))
    assert "\n" not in str(found.value)


def test_names_that_are_no_pipeline(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "nowhere", "no pipeline folder")
    refused("./nowhere", "no pipeline folder")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "folder", "no model_index.json")
    refused(" ", "empty name")
    refused(7, "must be a folder or a hub id, got a int")


def test_an_index_that_is_damaged_or_of_another_kind(copy_of: Callable[[str], Path]):
    folder = copy_of("sd")
    edit(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    refused(folder, "must be one of StableDiffusionPipeline, .* got a PixArtSigmaPipeline")
    edit(folder / "model_index.json", _class_name=["my_code", "Mine"])
    refused(folder, "must be one of")
    (folder / "model_index.json").write_text("{")
    refused(folder, "cannot be loaded")


def test_code_that_comes_with_a_pipeline_is_never_run(copy_of: Callable[[str], Path]):
    folder = copy_of("sd")
    (folder / "unet" / "mine.py").write_text("raise SystemExit('was run')")
    edit(folder / "model_index.json", unet=["mine", "Mine"])
    refused(folder, "comes from 'mine'; code that is not")


def test_only_safetensors_are_loaded(copy_of: Callable[[str], Path]):
    folder = copy_of("sd")
    torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()
    refused(folder, "no weights as .*safetensors, the only kind")
    shutil.rmtree(folder / "unet")
    refused(folder, "has no folder 'unet'")


def test_weights_that_are_damaged_missing_or_not_numbers(copy_of: Callable[[str], Path]):
    folder = copy_of("sd")
    edit_weights(folder / UNET, lambda weights: weights["conv_in.bias"].fill_(torch.nan))
    refused(folder, "unet of the pipeline .* NaN or infinite, first in 'conv_in.bias'")
    edit_weights(folder / UNET, lambda weights: weights.pop("conv_in.bias"))
    refused(folder, "conv_in.bias")
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-100])
    refused(folder, "cannot be loaded")


def test_schedulers_that_contradict_the_network(copy_of: Callable[[str], Path], pipeline_folder: Callable[..., Path]):
    refused(
        pipeline_folder("sd", prediction_type="flow_prediction"),
        "must be epsilon, v_prediction or sample, got 'flow_prediction'",
    )
    refused(pipeline_folder("sd", thresholding=True), "thresholding")
    folder = copy_of("sd3")
    made = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    made.register_modules(scheduler=diffusers.DDIMScheduler())
    made.save_pretrained(folder)
    refused(folder, "FlowMatchEulerDiscreteScheduler, got a DDIMScheduler", "sd3")
    refused(pipeline_folder("flux", shift_terminal=0.1), "shift_terminal", "flux")
    folder = copy_of("sd")
    made = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    made.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    made.save_pretrained(folder)
    refused(folder, "no alphas_cumprod")


def test_parts_that_do_not_fit_each_other(tmp_path: Path):
    for name, network, match in (
        ("inpainting", unet(16, in_channels=9), "9 channels, but the autoencoder's latents have 4"),
        ("width", unet(24), "prompt_embeds must be of width 24 for its network, got 16"),
        ("distilled", unet(16, time_cond_proj_dim=8), "time_cond_proj_dim"),
    ):
        made = tiny("sd")
        made.register_modules(unet=network)
        made.save_pretrained(tmp_path / name)
        refused(tmp_path / name, match)


def test_options_that_do_not_fit(pipeline_folder: Callable[..., Path], tmp_path: Path):
    refused(pipeline_folder("sd"), "height must be a positive multiple of 2 for this pipeline, got 17", height=17)
    refused(pipeline_folder("sd"), "height must be a positive multiple of 2 for this pipeline, got 0", height=0)
    refused(
        pipeline_folder("flux"), "width must be a positive multiple of 4 for this pipeline, got 18", "flux", width=18
    )
    refused(pipeline_folder("sd3"), "must be at most 32 for this pipeline, got 36 and", "sd3", height=36)
    refused(pipeline_folder("sd"), "fixed length", max_sequence_length=16)
    refused(pipeline_folder("sd"), "dtype must be one of .* got float8", dtype="float8")
    refused(pipeline_folder("sd"), "no device 'nowhere'", device="nowhere")
    refused(pipeline_folder("sd"), "no solver 'dimm'", solver="dimm")
    refused(pipeline_folder("sd"), "times cannot be given beside steps", times=[1.0, 0.0])
    made = tiny("flux")
    made.transformer.register_to_config(guidance_embeds=False)
    made.transformer = type(made.transformer).from_config(made.transformer.config)
    made.save_pretrained(tmp_path / "schnell")
    refused(tmp_path / "schnell", "guidance must be left out", "flux", guidance=3.0)
    assert pipeline(tmp_path / "schnell", **options("flux")).sampler.guidance == 1.0


def test_adapters_that_do_not_fit(pipeline_folder: Callable[..., Path], tmp_path: Path):
    pytest.importorskip("peft", reason="adapters need peft installed")
    refused(pipeline_folder("sd"), "LoRA options .* do not fit", lora={"target_modules": ["nothing"]})
    refused(pipeline_folder("sd"), "LoRA options .* do not fit", lora={"rank": 3})
    refused(pipeline_folder("sd"), f"holds no {LORA_FILE}", lora=tmp_path)
    pipeline(pipeline_folder("sd3"), lora={}, **options("sd3")).save(tmp_path)
    refused(pipeline_folder("sd"), "adapter", lora=tmp_path)
    (tmp_path / LORA_FILE).write_bytes(b"nothing")
    refused(pipeline_folder("sd3"), "header too small", "sd3", lora=tmp_path)


def small(pipeline_folder: Callable[..., Path], **changes: Any) -> Flow:
    return pipeline(pipeline_folder("sd"), **(options("sd") | changes))


def test_what_is_handed_in_later_is_checked_too(pipeline_folder: Callable[..., Path]):
    process = small(pipeline_folder)
    time, condition = torch.ones(2), process.condition(["a", "b"])
    with pytest.raises(InputError, match="must be a text"):
        process.condition([{"role": "user", "content": "a"}])
    with pytest.raises(InputError, match=r"must be of shape \(4, 8, 8\), got \(4, 8, 6\)"):
        process.predict(torch.zeros(2, 4, 8, 6), time, condition)
    with pytest.raises(InputError, match="condition must be prompt_embeds, got nothing"):
        process.predict(noise_for(), time, None)
    with pytest.raises(StepwellError, match="decoded images have values that are NaN"):
        process.decoded(torch.full((1, 4, 8, 8), torch.nan))
    next(process.module.parameters()).data.fill_(torch.nan)
    state = process.advance(process.start(["a"], Rng(0)), noise_for(1), Rng(0))
    with pytest.raises(InputError, match="NaN"):
        process.propose(state)
    with pytest.raises(InputError, match="choose another folder"):
        process.save(pipeline_folder("sd") / "model_index.json")


def test_a_pipeline_without_the_largest_text_encoder(pipeline_folder: Callable[..., Path], tmp_path: Path):
    """Stable Diffusion 3 is often used without T5, whose place zeros then take."""
    folder = Path(shutil.copytree(pipeline_folder("sd3"), tmp_path / "sd3"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        edit(folder / "model_index.json", **{part: [None, None]})
    process = pipeline(folder, **options("sd3"))
    condition = process.condition(["a cat"])
    assert condition is not None
    assert condition["prompt_embeds"][:, 16:].abs().max() == 0


def test_the_shift_grows_with_the_size_of_the_image():
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dynamic)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
        factor = shift_of(scheduler, tokens)
        assert factor * 0.5 / (1 + (factor - 1) * 0.5) == pytest.approx(float(scheduler.sigmas[1]), rel=1e-6)
    linear = diffusers.FlowMatchEulerDiscreteScheduler(**dynamic, time_shift_type="linear")
    assert shift_of(linear, 256) == 0.5
    assert shift_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 256) == 3.0


def test_without_diffusers_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'stepwell\[flow\]'"):
        pipeline("anything")


def test_text_encoders_are_whole_and_their_adapters_are_refused(copy_of, tmp_path):
    """Neither is a text encoder made up at random, nor an adapter of one read and then lost."""
    folder = copy_of("sd")
    weights = {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    refused(folder, "also adapts text encoders", lora=tmp_path)
    file = next((folder / "text_encoder").glob("*.safetensors"))
    edit_weights(file, lambda tensors: tensors.pop(next(name for name in tensors if "fc1.weight" in name)))
    refused(folder, "weights lack .*fc1")
