"""A tokenizer of single bytes that loses no space, with the special tokens and chat templates of well-known kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stepwell.process.language.build import language
from stepwell.process.language.process import Language

SPECIAL = {
    "llama 3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"],
}
BOS = {"llama 3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>"}
EOS = {"llama 3": "<|end_of_text|>", "chatml": "<|endoftext|>", "gemma": "<eos>", "mistral": "</s>"}
CLOSING = {"llama 3": "<|eot_id|>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
TEMPLATES = {
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t.function.name }}{% endfor %}<|im_end|>\n"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
    ),
}
ASK = [{"role": "user", "content": "Say blue."}]
KINDS = tuple(TEMPLATES)


def tokenizer(kind: str, *, more: tuple[str, ...] = (), adds: str = "$A", template: str | None = None) -> Any:
    """The tokenizer of a kind. `adds` is what it writes around plain texts, and `more` are further special tokens."""
    from tokenizers import processors

    special = [*SPECIAL[kind], *more]
    made = spelling(
        special, bos=BOS.get(kind), eos=EOS[kind], template=TEMPLATES[kind] if template is None else template
    )
    if adds != "$A":
        used = [(token, made.convert_tokens_to_ids(token)) for token in special if token in adds]
        made._tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=used)
    return made


def spelling(special: Sequence[str], *, bos: str | None, eos: str, template: str) -> Any:
    """A tokenizer of single bytes and these special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*special, "<pad>"]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def chatty(kind: str, *, ends: tuple[str, ...] = (), size: int | None = None, **options: Any) -> Language:
    """A tiny model with the tokenizer of a kind, whose settings list `ends`, and `size` ids in all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {name: options.pop(name) for name in ("more", "adds", "template") if name in options}
    words = tokenizer(kind, **own)
    numbers = [words.convert_tokens_to_ids(token) for token in ends] or [words.eos_token_id]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=size or len(words),
        **sizes,
        max_position_embeddings=options.pop("positions", 256),
        eos_token_id=numbers,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return language(model, words, **{"max_new_tokens": 32, **options})


def likely(process: Language, *tokens: str) -> None:
    """Have the model draw these tokens alone, all equally often."""
    ids = [process.tokenizer.convert_tokens_to_ids(token) for token in tokens]
    head = process.network.causal.lm_head
    head.bias = torch.nn.Parameter(torch.full((head.out_features,), -100.0))
    with torch.no_grad():
        head.weight.zero_()
        head.bias[ids] = 0.0


def shown(process: Any, ids: Any) -> str:
    """Token ids as they would be written."""
    return str(process.encoder.tokenizer.decode(ids))
