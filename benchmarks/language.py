"""Rollouts and scoring of a language model, beside `transformers` itself, in one run.

The last line is JSON: each ratio is the peer's time or memory over ours, above 1 means ours is better.
`rollout` draws a group of 8 for prompts of 64 tokens, 32 tokens each, against `generate` on repeated prompts.
`score` is log-probabilities with their gradient against plain logits; `memory_150k` is the largest tensor held at a
vocabulary of 150,000.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from stepwell import Prompt, Request, Rng, language, rollout

PROMPTS, GROUP, LENGTH, NEW = 4, 8, 64, 32


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    backend = Tokenizer(models.WordLevel(known, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(vocabulary: int, hidden: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of a few runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made while it is on."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        answer = function(*arguments, **(keywords or {}))
        for value in answer if isinstance(answer, tuple | list) else [answer]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return answer


def largest(work: Callable[[], object]) -> int:
    with Largest() as mode:
        work()
    return mode.elements


def main() -> None:
    torch.set_num_threads(2)
    words = tokenizer(32_000)
    network = model(32_000, 256)
    prompts = [" ".join(f"w{2 + (7 * i + j) % 30_000}" for j in range(LENGTH)) for i in range(PROMPTS)]
    process = language(network, words, max_new_tokens=NEW)
    requests = [Request(Prompt(i, text), GROUP) for i, text in enumerate(prompts)]
    ids = torch.tensor([words(text)["input_ids"] for text in prompts]).repeat_interleave(GROUP, 0)
    options = {"do_sample": True, "max_new_tokens": NEW, "min_new_tokens": NEW, "top_k": 0, "pad_token_id": 0}

    def generate() -> object:
        return network.generate(ids, attention_mask=torch.ones_like(ids), **options)

    drawn = rollout(process, requests, Rng(0)).trajectories
    whole = torch.cat([ids, drawn.action], 1)

    def plain() -> object:
        logits = network(whole).logits[:, LENGTH - 1 : -1]
        picked = logits.float().log_softmax(-1).gather(-1, drawn.action[..., None])
        return picked.sum().backward()

    def ours() -> object:
        return process.score(drawn).log_prob.sum().backward()

    ratios = {
        "rollout": seconds(generate) / seconds(lambda: rollout(process, requests, Rng(0))),
        "score": seconds(plain) / seconds(ours),
    }
    words, network = tokenizer(150_000), model(150_000, 32)
    process = language(network, words, max_new_tokens=NEW)
    rows = rollout(process, requests, Rng(0)).trajectories
    whole, drawn = torch.cat([ids, rows.action], 1), rows
    ratios["memory_150k"] = largest(plain) / largest(ours)
    print(json.dumps({name: round(value, 2) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
