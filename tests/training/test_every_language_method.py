"""Every method for language models trains a small causal model for a step, from texts and with all that it needs."""

from __future__ import annotations

import copy

import pytest
import torch

import stepwell as sw
from stepwell import methods
from stepwell.batch import Read

NAMES = [name for name in methods.names() if "language" in methods.get(name).processes]
DATA = [
    {"prompt": "a b c", "hinted": "a b c d e", "demonstration": "e f g"},
    {"prompt": "f", "hinted": "f g", "demonstration": "a"},
]
SMALL = {"steps": 1, "prompts_per_step": 2, "group_size": 4, "learning_rate": 1e-3, "seed": 4}


def words(completions, **columns):
    """No two texts of a group are likely to have the same."""
    return [sum(ord(letter) for letter in text) % 17 / 17 for text in completions]


def odd(completions, **columns):
    return [float(len(text.split()) % 2) for text in completions]


@pytest.fixture(scope="module")
def tiny(model_folder):
    """`tiny(seed)`: a copy of one model of a layer; another seed has other weights."""
    loaded = sw.language(model_folder("qwen2", num_hidden_layers=1), max_new_tokens=5, device="cpu", dtype="float32")

    def build(seed=0):
        process = copy.deepcopy(loaded)
        if seed:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for parameter in process.module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return process

    return build


def test_there_are_methods_to_try():
    assert len(NAMES) > 60


@pytest.mark.parametrize("name", NAMES)
def test_every_language_method_trains_a_causal_model_for_a_step(name, tiny):
    card, process = methods.get(name), tiny()
    short = {"segment": 2} if "segment" in card.options else {}
    recipe = card.recipe(**short)
    teacher = tiny(5) if any(read.of == "teacher" for read in recipe.whole.reads) else None
    before = {key: value.clone() for key, value in process.module.state_dict().items()}
    minibatches = min(recipe.minibatches, SMALL["prompts_per_step"])
    run = sw.train(process, DATA, [words, odd], recipe, teacher=teacher, minibatches=minibatches, **SMALL)
    (line,) = run.history
    assert line["updates"] == recipe.epochs * minibatches
    assert line["gradient_norm"] > 0
    after = process.module.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert moved, "nothing learnt"
    if "value" in recipe.whole.needs or Read("policy", "value") in recipe.whole.reads:
        assert "value" in run.process.offers
        assert bool(run.process.network.value_head.weight.abs().sum() > 0), "the critic learns too"
