"""Tiny configurations of the model families that the zoo tests, and of those that are refused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 34  # of the tests' tokenizer of single letters

ALIKE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "num_global_key_value_heads", "num_query_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("encoder_layers",), 2) | dict.fromkeys(("encoder_ffn_dim", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "decoder_max_position_embeddings"), 64),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "query_pre_attn_scalar", "hidden_size_per_layer_input", "sliding_window"), 8),
    **dict.fromkeys(("attention_window_size", "linear_key_head_dim", "linear_value_head_dim", "state_size"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size", "chunk_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "mamba_d_head", "mamba_headdim", "lora_rank"), 16),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads", "mamba_expand", "expand", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "time_step_rank", "laurel_rank"), 4),
    **{"lru_width": 32, "conv_L_cache": 3, "num_logits_to_keep": 0, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "attention_dropout": 0.0},
    **{"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": 3},
    **{"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "logits_scaling": 0.5, "logit_scale": 2.0},
    **{"embedding_multiplier": 1.5, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
}
"""What the configurations call their sizes; each takes those that it knows."""


@dataclass(frozen=True)
class Family:
    """One kind of model: the name that transformers gives its configuration, and what differs from `ALIKE`.

    weights: the deviation of its random matrices.
    """

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    weights: float = 0.3


def _named(kind: str, **changes: Any) -> Family:
    return Family(kind, changes)


MIXED = ["sliding_attention", "full_attention"]
PLAIN = """
    llama mistral qwen2 qwen3 qwen3_moe gemma gemma2 phi phi3 olmo olmo2 olmoe granite granitemoe granitemoeshared
    stablelm gpt2 gpt_neox gptj bloom falcon mixtral glm glm4 glm4_moe ernie4_5 ernie4_5_moe cohere nemotron
    hunyuan_v1_dense hunyuan_v1_moe starcoder2 opt xglm codegen biogpt qwen2_moe helium arcee seed_oss apertus dots1
    gpt_bigcode persimmon bitnet diffllama doge flex_olmo vaultgemma nanochat ministral ministral3 minimax_m2
    granite_swa cwm laguna solar_open hy_v3 jetmoe aria_text ctrl phimoe
""".split()

FAMILIES: dict[str, Family] = {name: Family(name) for name in PLAIN} | {
    "llama, tied": _named("llama", tie_word_embeddings=True),
    "qwen2, window": _named("qwen2", use_sliding_window=True, max_window_layers=1),
    "gemma3_text": _named("gemma3_text", layer_types=MIXED),
    "olmo3": _named("olmo3", layer_types=MIXED),
    "cohere2": _named("cohere2", layer_types=MIXED),
    "exaone4": _named("exaone4", layer_types=MIXED),
    "gpt_oss": _named("gpt_oss", layer_types=MIXED, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "falcon, alibi": _named("falcon", alibi=True, new_decoder_architecture=False),
    "mpt": _named("mpt", expansion_ratio=2),
    "gpt_neo": _named("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    "smollm3": _named("smollm3", no_rope_layers=[1, 0], use_sliding_window=False),
    "opt, norms after": _named("opt", do_layer_norm_before=False, word_embed_proj_dim=16),
    "deepseek_v2": _named("deepseek_v2", num_key_value_heads=4, topk_method="greedy"),
    "deepseek_v3": _named("deepseek_v3", num_key_value_heads=4),
    "glm4_moe_lite": _named("glm4_moe_lite", num_key_value_heads=4),
    "gemma3n_text": _named(
        "gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=MIXED * 2,
        intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "llama4_text": _named(
        "llama4_text",
        floor_scale=4,
        attn_scale=0.5,
        intermediate_size_mlp=48,
        no_rope_layers=[1, 0],
        attn_temperature_tuning=True,
    ),
    "phi3, longrope": _named(
        "phi3",
        sliding_window=None,
        original_max_position_embeddings=10,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 10,
            "partial_rotary_factor": 1.0,
        },
    ),
    "afmoe": _named("afmoe", layer_types=MIXED, num_dense_layers=1),
    "modernbert-decoder": Family("modernbert-decoder"),
    "mimo_v2_flash": Family("mimo_v2_flash"),
}


BOTH = ["linear_attention", "full_attention"]
STATEFUL: dict[str, Family] = {name: Family(name) for name in ("mamba", "falcon_mamba", "rwkv")} | {
    "mamba2": _named("mamba2", head_dim=16, num_heads=4, n_groups=1, expand=2),
    "jamba": _named(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "bamba": _named("bamba", attn_layer_indices=[1]),
    "zamba": Family(
        "zamba",
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_hidden_layers": 4,
            "mamba_dt_rank": 4,
            "attention_head_dim": 16,
        },
        weights=0.15,  # its layers, each of which adds the first embeddings again, would enlarge rounding
    ),
    "lfm2": _named("lfm2", layer_types=["conv", "full_attention"]),
    "lfm2_moe": _named("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": _named("lfm3", layer_types=["conv", "full_attention"]),
    "qwen3_next": _named("qwen3_next", layer_types=BOTH),
    "qwen3_5_text": _named("qwen3_5_text", layer_types=BOTH),
    "qwen3_5_moe_text": _named("qwen3_5_moe_text", layer_types=BOTH),
    "granitemoehybrid": _named("granitemoehybrid", layer_types=["mamba", "attention"]),
    "granitemoehybrid, attention": _named("granitemoehybrid", layer_types=["attention", "attention"]),
    "minimax": _named("minimax", layer_types=BOTH, sliding_window=None),
    "falcon_h1": _named("falcon_h1", mamba_d_ssm=64),
    "recurrent_gemma": _named("recurrent_gemma", block_types=["recurrent", "attention"]),
    "nemotron_h": _named(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4,
        n_groups=1,
    ),
    "xlstm": _named("xlstm", hidden_size=64, embedding_dim=64, qk_dim_factor=1.0),
    "zaya": _named("zaya", num_experts_per_tok=1),
    "kimi_linear": _named("kimi_linear", layer_types=BOTH, num_key_value_heads=4),
    "olmo_hybrid": _named("olmo_hybrid", layer_types=BOTH),
    "bailing_hybrid": _named("bailing_hybrid", layer_types=BOTH, num_key_value_heads=4),
    "inkling_text": Family("inkling_text"),
    "lara_mini": Family("lara_mini"),
    "deepseek_v4": _named(
        "deepseek_v4",
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
}

_PATCH = {"image_size": 8, "patch_size": 4, "num_channels": 3}
_SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2} | _PATCH
_QWEN_SIGHT = {"depth": 1, "num_heads": 2, "in_channels": 3, "patch_size": 4}
_WORDS = {"image_token_id": 31, "video_token_id": 32, "vision_start_token_id": 29, "vision_end_token_id": 30}
MULTIMODAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
SEEING: dict[str, Family] = {
    "qwen2_vl": _named(
        "qwen2_vl",
        text_config=MULTIMODAL,
        vision_config=_QWEN_SIGHT | {"embed_dim": 32, "hidden_size": 32},
        **_WORDS,
    ),
    "qwen2_5_vl": _named(
        "qwen2_5_vl",
        text_config=MULTIMODAL,
        vision_config=_QWEN_SIGHT
        | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [0]},
        **_WORDS,
    ),
    "qwen3_vl": _named(
        "qwen3_vl",
        text_config=MULTIMODAL,
        vision_config=_QWEN_SIGHT
        | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]},
        **_WORDS,
    ),
    "smolvlm": _named("smolvlm", text_config={"model_type": "llama"}, vision_config=_SIGHT, image_token_id=31),
    "llava": _named(
        "llava",
        text_config={"model_type": "llama"},
        vision_config=_SIGHT | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=31,
    ),
    "mistral3": _named(
        "mistral3",
        text_config={"model_type": "mistral"},
        vision_config=_SIGHT | {"model_type": "pixtral", "head_dim": 16},
        image_token_index=31,
    ),
    "qwen3_5": _named(
        "qwen3_5",
        text_config=MULTIMODAL | {"layer_types": BOTH},
        vision_config=_QWEN_SIGHT | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
        **_WORDS,
    ),
    "glm4v": _named(
        "glm4v",
        text_config=MULTIMODAL,
        vision_config=_QWEN_SIGHT | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
        **_WORDS,
    ),
    "lfm2_vl": _named(
        "lfm2_vl",
        text_config={"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        vision_config=_SIGHT | {"model_type": "siglip2_vision_model", "num_patches": 4},
        image_token_id=31,
    ),
    "idefics3": _named("idefics3", text_config={"model_type": "llama"}, vision_config=_SIGHT, image_token_id=31),
    "internvl": _named("internvl", text_config={"model_type": "qwen2"}, vision_config=_SIGHT, image_token_id=31),
    "gemma3": _named(
        "gemma3",
        text_config={"layer_types": MIXED},
        vision_config=_SIGHT | {"model_type": "siglip_vision_model"},
        image_token_index=31,
        mm_tokens_per_image=4,
    ),
}

REFUSED: dict[str, tuple[Family, str]] = {
    **{
        name: (Family(name), "up to .* from those of each text alone")
        for name in """
            bert roberta camembert xlm-roberta electra big_bird megatron-bert roformer rembert ernie data2vec-text
            bart mbart marian pegasus whisper plbart blenderbot trocr git mvp moshi
        """.split()
    },
    "roberta, decoder": (_named("roberta", is_decoder=True), "up to .* from those of each text alone"),
    "camembert, decoder": (_named("camembert", is_decoder=True), "up to .* from those of each text alone"),
    "zamba2": (
        _named(
            "zamba2",
            layers_block_type=["linear_attention", "hybrid"] * 2,
            num_hidden_layers=4,
            mamba_headdim=16,
            n_mamba_heads=4,
        ),
        "up to .* from those of each text alone",
    ),
    "minimax, window": (_named("minimax", layer_types=BOTH), "up to .* from those of each text alone"),
    "paligemma": (
        _named(
            "paligemma",
            text_config={"model_type": "gemma"},
            vision_config=_SIGHT | {"model_type": "siglip_vision_model", "projection_dim": 32},
            image_token_index=31,
            projection_dim=32,
        ),
        "up to .* from those of each text alone",
    ),
    "openai-gpt": (Family("openai-gpt"), "takes no cache"),
    "xlnet": (Family("xlnet"), "takes no cache"),
    "prophetnet": (Family("prophetnet"), "cannot be read token by token"),
    "cpmant": (Family("cpmant"), "cannot be read token by token"),
    "xlm": (Family("xlm"), "cannot be read token by token"),
}
"""Families whose numbers depend on more than the text before a token, and what the refusal says."""


def tiny(family: Family) -> Any:
    """A random model of the family, with weights large enough that its distributions are far from uniform."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = CONFIG_MAPPING[family.kind]
    changes = dict(family.changes)
    if "text_config" in changes:
        text = changes["text_config"]
        inner = CONFIG_MAPPING[text["model_type"]] if "model_type" in text else kind.sub_configs["text_config"]
        changes["text_config"] = _accepted(inner) | text
    loader = AutoModelForImageTextToText if "vision_config" in changes else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = loader.from_config(kind(**_accepted(kind) | changes))
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draws)
            if parameter.dim() > 1:
                parameter.copy_(noise * family.weights)
            else:
                parameter.add_(noise * 0.2)
    return model.eval()


def _accepted(kind: Any) -> dict[str, Any]:
    """The sizes that a configuration knows; an alias of another is left out."""
    known = {name for parent in kind.__mro__ for name in getattr(parent, "__annotations__", {})}
    aliases = getattr(kind, "attribute_map", {})
    known |= set(inspect.signature(kind.__init__).parameters) | set(aliases)
    sizes = {name: value for name, value in ALIKE.items() if name in known}
    return {name: value for name, value in sizes.items() if aliases.get(name) not in sizes}
