"""Pipelines of diffusers as a process: the same images as theirs, texts encoded once, images differentiable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from tiny_pipelines import PROMPTS, ddim, distance, loaded, noise_for, options, ours, settings_of, theirs, tiny
from torch import Tensor

from stepwell.check.tolerance import rounding
from stepwell.process.flow.process import Flow
from stepwell.process.pipeline import networks as pipeline_networks
from stepwell.process.pipeline.build import pipeline
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

diffusers = pytest.importorskip("diffusers", reason="pipelines need diffusers installed")


TOLERANCE = rounding(torch.float32, 10_000)  # products on the way through all steps of a small pipeline


def parity(kind: str, folder: Path) -> float:
    made = loaded(kind, folder)
    made = ddim(made) if kind in ("sd", "sdxl") else made
    process = pipeline(folder, guidance=2.5, **options(kind))
    return distance(ours(process, noise_for()), theirs(made, noise_for(), **settings_of(kind)))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_latents_are_those_of_diffusers_own_pipeline(pipeline_folder: Callable[..., Path], kind: str):
    assert parity(kind, pipeline_folder(kind)) < TOLERANCE


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_the_network_predicts_is_what_the_scheduler_says(pipeline_folder: Callable[..., Path], kind: str):
    assert parity("sd", pipeline_folder("sd", prediction_type=kind)) < TOLERANCE


def test_a_schedule_that_ends_in_pure_noise(pipeline_folder: Callable[..., Path]):
    folder = pipeline_folder("sd", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert pipeline(folder, **options("sd")).path.alpha(1.0) == 0.0
    assert parity("sd", folder) < TOLERANCE


def test_any_of_their_grids_can_be_given(pipeline_folder: Callable[..., Path]):
    """A "leading" grid starts below t = 1; its steps are t = (timestep + 1) / T here, but for the end, which is 0."""
    folder = pipeline_folder("sd")
    made = loaded("sd", folder)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config, set_alpha_to_one=True, steps_offset=0)
    made.scheduler.set_timesteps(20)
    times = [(int(step) + 1) / 1000 for step in made.scheduler.timesteps]
    process = pipeline(folder, guidance=2.5, **(options("sd") | {"steps": None, "times": [*times, 0.0]}))
    right = theirs(made, noise_for(), num_inference_steps=20, guidance_scale=2.5)
    assert distance(ours(process, noise_for()), right) < TOLERANCE


def test_flux_is_guided_by_a_second_evaluation_too(pipeline_folder: Callable[..., Path]):
    folder = pipeline_folder("flux")
    process = pipeline(folder, guidance=2.5, negative_prompt="dog", **options("flux")).with_sampler(guidance=3.0)
    extra = {"true_cfg_scale": 3.0, "negative_prompt": ["dog", "dog"]}
    right = theirs(loaded("flux", folder), noise_for(), **settings_of("flux"), **extra)
    assert distance(ours(process, noise_for()), right) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline_folder: Callable[..., Path], kind: str):
    folder = pipeline_folder(kind)
    process = pipeline(folder, guidance=2.5, negative_prompt="dog", **options(kind))
    right = theirs(ddim(loaded(kind, folder)), noise_for(), **settings_of(kind), negative_prompt=["dog", "dog"])
    assert distance(ours(process, noise_for()), right) < TOLERANCE
    assert distance(ours(pipeline(folder, guidance=2.5, **options(kind)), noise_for()), right) > 100 * TOLERANCE


def test_planted_mistakes_break_the_parity(pipeline_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """One training step off, SD3's timestep off by one, SDXL's sizes swapped with its crop, FLUX's patches turned."""
    with monkeypatch.context() as planted:
        planted.setattr(pipeline_networks, "timestep", lambda t, steps: t * steps)
        assert parity("sd", pipeline_folder("sd")) > TOLERANCE
    with monkeypatch.context() as planted:
        right = pipeline_networks.SD3.predict
        planted.setattr(
            pipeline_networks.SD3, "predict", lambda own, x, t, condition: right(own, x, t - 1e-3, condition)
        )
        assert parity("sd3", pipeline_folder("sd3")) > TOLERANCE
    with monkeypatch.context() as planted:
        read = pipeline_networks.UNet.predict

        def swapped(own: Any, x: Tensor, t: Tensor, condition: Any) -> Tensor:
            own.time_ids = (0, 0, 16, 16, 16, 16)
            return read(own, x, t, condition)

        planted.setattr(pipeline_networks.UNet, "predict", swapped)
        assert parity("sdxl", pipeline_folder("sdxl")) > TOLERANCE
    with monkeypatch.context() as planted:
        pack, unpack = pipeline_networks.pack, pipeline_networks.unpack
        planted.setattr(pipeline_networks, "pack", lambda x: pack(x.transpose(2, 3)))
        planted.setattr(pipeline_networks, "unpack", lambda x, h, w: unpack(x, w, h).transpose(2, 3))
        assert parity("flux", pipeline_folder("flux")) > TOLERANCE


def test_a_text_is_encoded_once_and_alike_beside_any_other(pipeline_folder: Callable[..., Path]):
    for kind in tiny_pipelines.KINDS:
        process = pipeline(pipeline_folder(kind), **options(kind))
        encoder: Any = process.encode
        calls: list[str] = []
        own = encoder.pipeline.encode_prompt
        encoder.pipeline.encode_prompt = lambda prompt, *rest, own=own, calls=calls, **settings: (
            calls.append(prompt),
            own(prompt, *rest, **settings),
        )[1]
        rollout(process, [Request(Prompt(i, text), 2) for i, text in enumerate(PROMPTS)], Rng(0))
        both, again = encode(process, [*PROMPTS, PROMPTS[0]]), encode(process, PROMPTS[1:])
        assert [calls.count(text) for text in PROMPTS] == [1, 1]
        for name, value in both.items():
            assert torch.equal(value[0], value[2])
            assert torch.equal(value[1:2], again[name])
            assert not value.requires_grad


def encode(process: Flow, prompts: list[str]) -> dict[str, Tensor]:
    assert process.encode is not None
    return dict(process.encode(prompts))


@pytest.mark.parametrize(
    "kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", pytest.param("flux", marks=pytest.mark.slow)]
)
def test_images_are_those_of_diffusers(tmp_path: Path, kind: str):
    written = tiny(kind)
    if kind == "sdxl":  # as some of them do
        written.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    written.save_pretrained(tmp_path)
    process, made = pipeline(tmp_path, guidance=2.5, **options(kind)), loaded(kind, tmp_path)
    made = ddim(made) if kind in ("sd", "sdxl") else made
    right = theirs(made, noise_for(), output_type="pt", **settings_of(kind))
    images = process.decoded(ours(process, noise_for()))
    assert images.shape == (2, 3, 16, 16)
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    assert distance(images, right) < TOLERANCE


def test_images_are_differentiable_in_their_own_latents(pipeline_folder: Callable[..., Path]):
    process = pipeline(pipeline_folder("sd3"), **options("sd3"))
    latents = (0.1 * noise_for()).requires_grad_(True)
    images = process.decoded(latents)
    assert process.decode is not None
    assert all(not parameter.requires_grad for parameter in process.decode.autoencoder.parameters())  # type: ignore
    (gradient,) = torch.autograd.grad(images[0].sum(), latents)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (process.decoded(latents + step)[0].sum() - process.decoded(latents - step)[0].sum()) / 2e-3
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-2)  # but for float32 sums of 768 values


def test_guidance_up_to_one_is_none(pipeline_folder: Callable[..., Path]):
    folder = pipeline_folder("sd")
    right = theirs(ddim(loaded("sd", folder)), noise_for(), num_inference_steps=4, guidance_scale=0.0)
    for guidance in (0.0, 1.0):
        assert distance(ours(pipeline(folder, guidance=guidance, **options("sd")), noise_for()), right) < TOLERANCE


@pytest.mark.parametrize("kind", ["sd", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sdxl", "sd3")), "flux"])
def test_activations_can_be_computed_again(pipeline_folder: Callable[..., Path], kind: str):
    gradients = []
    for checkpointing in (False, True):
        process = pipeline(pipeline_folder(kind), lora={}, checkpointing=checkpointing, **options(kind))
        condition = process.condition(PROMPTS)
        process.predict(noise_for(), torch.tensor([0.5, 0.9]), condition, 2.0).square().sum().backward()
        gradients.append([p.grad for p in process.module.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.allclose(a, b, atol=rounding(torch.float32, 100)) for a, b in zip(*gradients, strict=True))
