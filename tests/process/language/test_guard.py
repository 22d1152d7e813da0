"""The guard: a model that gives a text other numbers beside others, or from a cache, than alone is refused at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stepwell.errors import InputError
from stepwell.process.language import guard, reading
from stepwell.process.language.build import language
from stepwell.process.language.network import CausalNetwork
from stepwell.process.language.process import Language

Build = Callable[..., Language]
SIZES: dict[str, Any] = {"vocab_size": 34, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "hidden_size": 32,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
                         "max_position_embeddings": 64}  # fmt: skip
DECODER: dict[str, Any] = {"vocab_size": 34, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "d_model": 32,
                           "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
                           "max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "sees what follows": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=False)),
    "positions by columns": lambda: transformers.PLBartForCausalLM(transformers.PLBartConfig(**DECODER)),
    "positions by padding ids": lambda: transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**SIZES, is_decoder=True)
    ),
}


def random(model: Any) -> Any:
    """The model with weights large enough that its distributions are far from uniform."""
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_reads_more_than_the_text_before_a_token_is_refused_with_both_numbers(
    kind: str, make_tokenizer: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="cannot be read step by step") as refusal:
        language(random(MODELS[kind]()), make_tokenizer())
    largest, allowed = re.search(r"up to (\S+) from those .* where (\S+) would", str(refusal.value)).groups()  # type: ignore[union-attr]
    assert float(largest) > 100 * float(allowed) > 0


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_causal_models_pass_at_every_precision(architecture: str, dtype: str, small_language: Build) -> None:
    assert small_language(architecture, dtype=dtype).network.checked


def test_a_built_encoder_with_a_decoder_is_refused_by_kind(make_tokenizer: Callable[..., Any]) -> None:
    config = transformers.T5Config(vocab_size=34, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="T5ForConditionalGeneration, an encoder with a decoder"):
        language(transformers.T5ForConditionalGeneration(config), make_tokenizer())


def test_a_model_without_a_cache_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=34, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    with pytest.raises(InputError, match="OpenAIGPTLMHeadModel takes no cache"):
        language(transformers.OpenAIGPTLMHeadModel(config), make_tokenizer())


def test_the_guard_costs_the_meter_nothing_and_draws_no_number(small_language: Build) -> None:
    before = torch.random.get_rng_state()
    process = small_language("qwen2")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert process.meter.spent.model_evaluations == process.meter.spent.forward == 0
    assert process.network.shares == {}, "the fast paths are tried when they are first used"


def test_a_network_and_its_twins_are_checked_once(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    process = small_language("qwen2")
    monkeypatch.setattr(guard, "_disagreement", lambda *_: (1.0, 0.0))
    for twin in (process, process.frozen(), process.metered(process.meter), process.with_value_head()):
        twin.start(["a"], None)  # type: ignore[arg-type]
    process.network.checked.clear()
    with pytest.raises(InputError, match="up to 1 from those"):
        process.start(["a"], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("mistake", ["positions", "mask", "fork", "score"])
def test_every_mistake_of_our_own_reading_is_caught(
    mistake: str, small_language: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_read, honest_fork, honest_run = CausalNetwork._read_on, reading.forked, CausalNetwork._run
    plants: dict[str, tuple[Any, str, Any]] = {
        "positions": (CausalNetwork, "position_ids", lambda _, mask: torch.arange(mask.shape[1]).expand(mask.shape)),
        "mask": (CausalNetwork, "_read_on", lambda self, c, ids, mask: honest_read(self, c, ids, mask | True)),
        "fork": (reading, "forked", lambda cache, index: honest_fork(cache, None if index is None else index * 0)),
        "score": (CausalNetwork, "_run", lambda *given, **named: tuple(
            None if part is None else part.flip(0) for part in honest_run(*given, **named))),
    }  # fmt: skip
    monkeypatch.setattr(*plants[mistake])
    with pytest.raises(InputError, match="cannot be read step by step"):
        small_language("gpt2")


def test_a_window_that_is_left_out_when_scoring_is_caught_though_it_is_long(
    make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mistral import modeling_mistral

    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": 1000}
    model = random(transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)))
    assert language(model, make_tokenizer()).network.checked
    honest, whole = modeling_mistral.create_sliding_window_causal_mask, modeling_mistral.create_causal_mask
    forgetful = lambda **given: (whole if given["cache"] is None else honest)(**given)  # noqa: E731
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", forgetful)
    with pytest.raises(InputError, match="cannot be read step by step"):
        language(model, make_tokenizer())
    assert model.config.sliding_window == 1000


def test_what_cannot_be_read_is_refused_before_a_file_is_written(
    tmp_path: Path, refused: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    random(MODELS["positions by columns"]()).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a b"}\n')
    (tmp_path / "mine.py").write_text("def reward(completions, **columns):\n    return [1.0 for _ in completions]\n")
    words = ["train", "--model", f"{tmp_path / 'model'}", "--data", f"{tmp_path / 'data.jsonl'}"]
    words += ["--reward", f"{tmp_path / 'mine.py'}:reward", "--method", "grpo", "--steps", "1"]
    message = refused(*words, "--out", f"{tmp_path / 'run'}")
    assert "PLBartForCausalLM cannot be read step by step" in message
    assert not (tmp_path / "run").exists()
