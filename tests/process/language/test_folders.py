"""A folder is loaded only if it is the model that it says, and what is saved is the model that was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_model, word_tokenizer
from safetensors.torch import load_file, save_file

from stepwell.errors import InputError, StepwellError
from stepwell.process.language import saving
from stepwell.process.language.build import language

IDS = torch.tensor([[9, 10, 11, 12]])


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A model's folder, its tensors changed by `edit` and its configuration by the rest."""

    def make(architecture: str = "llama", edit: Callable[[dict], Any] = lambda tensors: None, **config: Any) -> Path:
        place = tmp_path / "model"
        small_model(architecture, tie_word_embeddings=config.pop("tie", False)).save_pretrained(place)
        word_tokenizer().save_pretrained(place)
        tensors = load_file(place / "model.safetensors")
        edit(tensors)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(settings | config))
        return place

    return make


def refused(place: Any) -> str:
    with pytest.raises(InputError) as error:
        language(place, device="cpu")
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def without(name: str) -> Callable[[dict], Any]:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape)})


def test_a_folder_without_a_weight_is_refused(folder):
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        text = refused(folder(edit=without(name)))
        assert f"'{name}'" in text
        assert "made up at random" in text


def test_weights_of_another_model_are_refused(folder):
    assert "'score.weight'" in refused(folder(edit=with_tensor("score.weight", 1, 32), tie=True))
    assert "q_proj.bias" in refused(folder("qwen2", model_type="llama", architectures=["LlamaForCausalLM"]))
    assert "layers.1" in refused(folder(num_hidden_layers=1))
    assert "another shape" in refused(folder(intermediate_size=40))


def test_harmless_extra_tensors_stay_harmless(folder):
    plain = language(folder(), device="cpu").network.causal(IDS).logits
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "visual.blocks.0.weight", "v_head.summary.weight"):
        assert torch.equal(language(folder(edit=with_tensor(name, 4)), device="cpu").network.causal(IDS).logits, plain)


def test_quantised_and_broken_weights_are_refused(folder):
    def small(tensors: dict) -> None:
        tensors.update({name: value.to(torch.int8) for name, value in tensors.items()})

    def eight(tensors: dict) -> None:
        tensors.update({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()})

    def nan(tensors: dict) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    assert "quantised" in refused(folder(edit=small))
    assert "quantised" in refused(folder(edit=eight))
    assert "NaN" in refused(folder(edit=nan))
    assert "quantised" in refused(folder(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))


def test_a_model_of_another_kind_is_refused_at_loading(folder):
    assert "encoder with a decoder" in refused(folder(model_type="bart", is_encoder_decoder=True))
    assert "encoder with a decoder" in refused(folder(model_type="t5"))
    assert "head over tokens" in refused(folder(model_type="vit"))


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "config is nested": lambda f: (f / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "config is binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config is a loop": lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to(f / "config.json")),
    "weights are cut": lambda f: os.truncate(f / "model.safetensors", 1000),
    "weights are empty": lambda f: os.truncate(f / "model.safetensors", 0),
    "weights are a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "weights are a pipe": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "tokenizer is cut": lambda f: os.truncate(f / "tokenizer.json", 50),
    "tokenizer is a list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "settings are nested": lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
    "generation is cut": lambda f: (f / "generation_config.json").write_text("{x"),
    "an end is a word": lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
    "an adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_is_refused_in_one_sentence(folder, breakage):
    place = folder()
    BREAKAGES[breakage](place)
    refused(place)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "16"},
        {"hidden_size": True},
        {"hidden_size": -1},
        {"num_hidden_layers": 10**7},
        {"num_attention_heads": 0},
        {"vocab_size": 0},
        {"model_type": None},
        {"hidden_act": "nope"},
        {"dtype": "nope", "rms_norm_eps": "nan"},
        {"rope_parameters": {"rope_type": "zz"}},
    ],
    ids=str,
)
def test_a_wrong_setting_of_a_folder_is_refused_in_one_sentence(folder, wrong):
    refused(folder(**wrong))


def test_an_index_that_names_what_is_not_there_is_refused(folder):
    place = folder()
    (place / "model.safetensors").rename(place / "other.safetensors")
    index = place / "model.safetensors.index.json"
    for value, words in (
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks 'gone.safetensors'"),
        ({"weight_map": {"a": "../../etc/passwd"}}, "its own folder"),
        ([], "JSON object"),
        ({}, "weight_map"),
    ):
        index.write_text(json.dumps(value))
        assert words in refused(place)


@pytest.mark.parametrize("name", ["x" * 300, "/tmp/" + "x" * 300, "~nobody_here/model", "a\0b", ""])
def test_a_name_that_no_folder_can_have_is_refused(name):
    refused(name)


@pytest.mark.parametrize("name", ["gone.gguf", "weights/gone.GGUF", "model.safetensors"])
def test_the_name_of_a_file_that_is_not_there_is_no_id_of_the_hub(name, monkeypatch):
    """Which would be looked for, again and again, where there is no network."""
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("was looked for"))
    assert refused(name) == f"There is no file '{name}'."


def test_a_folder_without_a_tokenizer_is_told_what_it_lacks(folder):
    place = folder()
    for file in place.glob("token*"):
        file.unlink()
    assert "holds no tokenizer; copy that of its model into it" in refused(place)


ADAPTERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "every layer": {"target_modules": "all-linear"},
    "all-linear in a list": {"target_modules": ["all-linear"]},
    "head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed"]},
    "embeddings and head": {"target_modules": ["embed", "lm_head"]},
    "embeddings together": {"target_modules": ["embed"], "ensure_weight_tying": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed"]},
    "saved both": {"modules_to_save": ["embed", "lm_head"]},
    "saved together": {"modules_to_save": ["embed"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 9, 10]},
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_folder_is_the_trained_model(tmp_path, architecture, kind, tied):
    from transformers import AutoModelForCausalLM

    embeddings = "wte" if architecture == "gpt2" else "embed_tokens"
    options = {
        key: [embeddings if name == "embed" else name for name in value] if isinstance(value, list) else value
        for key, value in ADAPTERS[kind].items()
    }
    model = small_model(architecture, tie_word_embeddings=tied)
    process = language(model, word_tokenizer(), lora={"r": 4, **options}, device="cpu")
    with torch.no_grad():
        for parameter in process.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    before = {name: value.clone() for name, value in process.module.state_dict().items()}
    with torch.no_grad():
        live = process.network.causal(IDS).logits
        with process.network.module.model.disable_adapter():
            base = process.network.causal(IDS).logits
    assert float((live - base).abs().max()) > 0.01
    for twin, wanted in ((process, live), (process.frozen(), base)):
        twin.save(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert float((loaded(IDS).logits.detach() - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    after = process.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def moved(tensors):
    tensors["model.norm.weight"] += 1e-3


def lost(tensors):
    del tensors["model.norm.weight"]


@pytest.mark.parametrize("spoil", [moved, lost])
def test_a_folder_that_is_not_the_model_in_memory_is_an_error(spoil, small_language, tmp_path, monkeypatch):
    process = small_language("llama")
    whole = saving.weight_files

    def spoilt(place: Path) -> list[Path]:
        tensors = load_file(place / "model.safetensors")
        spoil(tensors)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return whole(place)

    monkeypatch.setattr(saving, "weight_files", spoilt)
    with pytest.raises(StepwellError, match="not the one in memory"):
        process.save(tmp_path)


def test_weights_that_are_shared_in_memory_alone_are_not_taken_for_tied_ones(tmp_path):
    """Of shared weights a file holds one, and a configuration without ties makes none of it for the other."""
    process = language(small_model("llama", tie_word_embeddings=True), word_tokenizer(), device="cpu")
    process.network.causal.config.tie_word_embeddings = False
    with pytest.raises(StepwellError, match=r"not the one in memory: it lacks 'lm_head\.weight'"):
        process.save(tmp_path)


def test_a_model_without_a_finite_logit_is_saved_as_it_is(small_language, tmp_path):
    process = small_language("llama")
    with torch.no_grad():
        process.network.causal.lm_head.weight.fill_(torch.nan)
    process.save(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].isnan().all()


def test_a_value_head_of_an_earlier_model_does_not_stay(small_language, tmp_path):
    process = small_language("llama")
    process.with_value_head().save(tmp_path)
    assert language(tmp_path, device="cpu").network.value_head is not None
    process.save(tmp_path)
    assert language(tmp_path, device="cpu").network.value_head is None


@pytest.mark.parametrize("first", [True, False], ids=["merged first", "adapter first"])
def test_an_adapter_and_a_whole_model_do_not_share_a_folder(first, small_language, tmp_path):
    process = small_language("llama", lora={"r": 2})
    process.save(tmp_path, merged=first)
    there = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="would be read as both; save to another folder"):
        process.save(tmp_path, merged=not first)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == there
    process.save(tmp_path, merged=first)


def test_a_gguf_file_loads_and_becomes_an_ordinary_folder(tmp_path):
    import numpy as np

    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra `gguf`")
    file, names = tmp_path / "small.gguf", [f"<{i}>" for i in range(34)]
    model = small_model("llama", hidden_size=64, intermediate_size=64, num_key_value_heads=4)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_vocab_size(34)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", *names[28:33], "<eos>"])
    writer.add_token_types([1] * 33 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(33)
    writer.add_pad_token_id(33)
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layers = {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}  # fmt: skip
    for i in range(2):
        theirs |= {f"model.layers.{i}.{ours}": f"blk.{i}.{name}" for ours, name in layers.items()}
    for name, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        place = f"{theirs[name.removesuffix('.weight')]}.weight"
        if name.endswith("mlp.up_proj.weight"):
            writer.add_tensor(place, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    process = language(file, device="cpu", max_new_tokens=4)
    process.save(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = language(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.network.causal(IDS).logits, process.network.causal(IDS).logits)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate_proj.weight"):
        assert torch.equal(process.network.causal.state_dict()[name], model.state_dict()[name])
    os.truncate(file, 500)
    refused(file)
