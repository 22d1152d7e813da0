"""Vision-language folders are read for texts, and saved as the folders that they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from conftest import word_tokenizer

from stepwell.check.tolerance import tolerance
from stepwell.process.language.build import language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

TEXT = {"vocab_size": 34, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8, "eos_token_id": 1, "pad_token_id": 0}
TEXT |= {"bos_token_id": None}
THREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
QWEN |= {"out_hidden_size": 32, "fullatt_block_indexes": [0], "num_position_embeddings": 16}
QWEN |= {"deepstack_visual_indexes": [0]}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
EYES |= {"patch_size": 8}
MARKS = {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}


def qwen(kind: Any) -> Any:
    return kind(text_config=TEXT | THREE, vision_config=QWEN, **MARKS)


CONFIGURATIONS = {
    "qwen2_vl": lambda: qwen(t.Qwen2VLConfig),
    "qwen2_5_vl": lambda: qwen(t.Qwen2_5_VLConfig),
    "qwen3_vl": lambda: qwen(t.Qwen3VLConfig),
    "smolvlm": lambda: t.SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=EYES, image_token_id=30
    ),
    "llava": lambda: t.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=EYES | {"model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=30,
    ),
    "mistral3": lambda: t.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=EYES | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=30,
        vision_feature_layer=-1,
    ),
    "gemma3": lambda: t.Gemma3Config(
        text_config=TEXT | {"sliding_window": 8}, vision_config=EYES, image_token_index=30, mm_tokens_per_image=4
    ),
}


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_a_vision_language_folder_reads_texts_and_is_saved_as_itself(tmp_path, family):
    config = CONFIGURATIONS[family]()
    kind = t.AutoModelForImageTextToText._model_mapping[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    process = language(tmp_path / "model", device="cpu", max_new_tokens=4)
    assert type(process.network.causal) is kind
    rows = rollout(process, [Request(Prompt(0, "a b c"), 3), Request(Prompt(1, "d"), 2)], Rng(0)).trajectories
    with torch.no_grad():
        assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) <= tolerance(process.module)
    adapted = language(tmp_path / "model", device="cpu", lora={"r": 2})
    ids = torch.tensor([[9, 10, 11]])
    for twin in (process, adapted):
        twin.save(tmp_path / "saved")
        again = kind.from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            assert float((again(ids).logits - twin.network.causal(ids).logits).abs().max()) <= 1e-5
