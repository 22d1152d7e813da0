"""An adapted model: only the adapter learns, its reference is the base on the same weights, and merging keeps it."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import word_tokenizer

from stepwell.check.tolerance import tolerance
from stepwell.errors import InputError, StepwellError
from stepwell.process.language import saving
from stepwell.process.language.build import language
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories

Build = Callable[..., Language]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.3}


def drawn(process: Language) -> Trajectories:
    requests = [Request(Prompt(0, "a b c"), 5), Request(Prompt(1, "d"), 5)]
    return rollout(process, requests, Rng(0)).trajectories


def scored(process: Language, rows: Trajectories) -> torch.Tensor:
    with torch.no_grad():
        return process.score(rows).log_prob


def one_step(process: Language, reference: Language, rows: Trajectories) -> None:
    """A large step of plain gradient ascent on whatever learns."""
    learning = [p for p in process.module.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learning, 0.05)
    (process.score(rows, {"kl"}, reference=reference)["kl"].sum() - process.score(rows).log_prob.sum()).backward()
    optimiser.step()


def test_the_reference_is_the_base_and_the_ratio_starts_at_one(small_language: Build) -> None:
    base, process = small_language("llama"), small_language("llama", lora=LORA)
    reference = process.frozen()
    assert all("lora" in name for name, p in process.module.named_parameters() if p.requires_grad)
    rows = drawn(base)
    for _ in range(3):
        one_step(process, reference, rows)
    assert all("lora" in name for name, p in process.module.named_parameters() if p.requires_grad)
    own = drawn(process)
    assert float((scored(process, own) - own.log_prob).abs().max()) <= tolerance(process.module)
    assert float((scored(process, rows) - rows.log_prob).abs().max()) > 0.05
    assert torch.equal(scored(reference, rows), scored(base, rows))
    assert process.network.fast
    assert reference.module is process.module
    assert torch.equal(drawn(reference).action, drawn(base).action)
    with pytest.raises(InputError, match="cannot follow"):
        reference.sync(process)


def test_the_gradient_through_kl_is_that_of_the_plain_path(small_language: Build) -> None:
    process = small_language("llama", lora=LORA, dtype="float64")
    reference = process.frozen()
    rows, gradients = drawn(process), []
    one_step(process, reference, rows)
    for fast in (True, False):
        process.network.fast = reference.network.fast = fast
        process.module.zero_grad()
        process.score(rows, {"kl"}, reference=reference)["kl"].sum().backward()
        gradients.append({name: p.grad for name, p in process.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        assert float((gradient - gradients[1][name]).abs().max()) <= 1e-10


def test_the_merged_model_loads_and_the_one_in_training_is_untouched(small_language: Build, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    process = small_language("llama", lora=LORA)
    reference = process.frozen()
    one_step(process, reference, drawn(process))
    rows, before = drawn(process), {name: p.clone() for name, p in process.module.named_parameters()}
    process.save(tmp_path / "merged")
    process.save(tmp_path / "adapter", merged=False)
    reference.save(tmp_path / "base")
    assert all(torch.equal(p, before[name]) for name, p in process.module.named_parameters())
    merged = language(tmp_path / "merged", device="cpu", max_new_tokens=10)
    assert torch.allclose(scored(merged, rows), rows.log_prob, atol=tolerance(process.module))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = language(PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload(), process.tokenizer)
    assert torch.allclose(scored(again, rows), rows.log_prob, atol=tolerance(process.module))


def test_an_adapted_head_takes_the_plain_path(small_language: Build) -> None:
    options = {"r": 2, "target_modules": ["lm_head"]}
    process = small_language("llama", lora=options, dtype="float64")
    rows = drawn(process)
    with pytest.warns(UserWarning, match="in an unknown way"):
        one_step_score = process.score(rows).log_prob
    assert torch.allclose(one_step_score.detach(), rows.log_prob, atol=1e-10)
    one_step_score.sum().backward()


def test_the_adapters_start_uses_no_global_randomness(small_language: Build) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = small_language("llama", lora=LORA)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = small_language("llama", lora=LORA)
    pairs = zip(first.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_bad_adapters(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="do not fit this model"):
        small_language("llama", lora={"rank": 4})
    with pytest.raises(InputError, match="do not fit this model"):
        small_language("llama", lora={"target_modules": ["nothing"]})
    honest = builtins.__import__

    def without_peft(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return honest(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(InputError, match=r"stepwell\[lora\]"):
        small_language("llama", lora=LORA)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapter_alone_is_only_saved_where_there_is_one(frozen, small_language, tmp_path):
    process = small_language("llama", lora=LORA).frozen() if frozen else small_language("llama")
    with pytest.raises(InputError, match="merged=False saves an adapter alone, and the model has none"):
        process.save(tmp_path / "adapter", merged=False)
    assert not (tmp_path / "adapter").exists()


def adapted_layers(process: Any) -> set[str]:
    """The layers with an adapter, by the last part of their names."""
    names = {name.partition(".lora_A")[0] for name, _ in process.module.named_parameters() if "lora_A" in name}
    return {name.rpartition(".")[2] for name in names}


def folder_of(name: str, folder: Path, **changes: Any) -> Path:
    from zoo.families import FAMILIES, SEEING, STATEFUL, tiny

    tiny(replace({**FAMILIES, **STATEFUL, **SEEING}[name], **changes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}], ids=["default", "all"])
@pytest.mark.parametrize("name", ["mamba", "zamba", "mixtral", "qwen2_vl"])
def test_without_targets_every_adapter_learns_and_is_merged(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    process = language(folder_of(name, tmp_path / "model"), device="cpu", max_new_tokens=6, lora={"r": 2, **options})
    noise = torch.Generator().manual_seed(0)
    learning = {name: p for name, p in process.module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    rows = drawn(process)
    process.score(rows).log_prob.sum().backward()
    assert not [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    process.save(tmp_path / "merged")
    merged = language(tmp_path / "merged", device="cpu", max_new_tokens=6)
    assert torch.allclose(scored(merged, rows), rows.log_prob, atol=tolerance(process.module))


def test_rounding_that_a_deep_model_enlarges_is_not_taken_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("zamba", tmp_path / "model", weights=0.3)
    process = language(folder, device="cpu", lora={"r": 4})
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in process.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    process.save(tmp_path / "merged")
    monkeypatch.setitem(saving.ROUNDING, torch.float32, 0.0)
    process.save(tmp_path / "merged")
    monkeypatch.setattr(saving, "DIGITS", 0.0)
    with pytest.raises(StepwellError, match="would be rounding"):
        process.save(tmp_path / "merged")


def test_a_target_that_would_learn_nothing_is_refused(tmp_path: Path) -> None:
    mamba, seeing = (folder_of(name, tmp_path / name) for name in ("mamba", "qwen2_vl"))
    with pytest.raises(InputError, match=r"'dt_proj' is no linear layer that a MambaForCausalLM reads texts through"):
        language(mamba, device="cpu", lora={"target_modules": ["x_proj", "dt_proj"]})
    with pytest.raises(InputError, match=r"'visual\.blocks\.0\.attn\.qkv' is no linear layer"):
        language(seeing, device="cpu", lora={"target_modules": ["q_proj", "visual.blocks.0.attn.qkv"]})


@pytest.mark.parametrize("excluded", [["q_proj"], r".*q_proj"])
def test_what_a_user_excludes_stays_excluded(excluded: Any, tmp_path: Path) -> None:
    model = folder_of("qwen2_vl", tmp_path / "model")
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted_layers(language(model, device="cpu", lora={"target_modules": "all-linear"})) == every
    some = language(model, device="cpu", lora={"target_modules": "all-linear", "exclude_modules": excluded})
    assert adapted_layers(some) == every - {"q_proj"}
