"""Methods of credit run: their planners, notes and states go through the loop, and resume bit for bit."""

from __future__ import annotations

import pytest

import stepwell as sw
from stepwell import methods
from stepwell.errors import InputError

FILES = ("stepwell.methods.language.credit", "stepwell.methods.language.trees")
NAMES = [name for name in methods.names() if methods.get(name).build.__module__ in FILES]
OTHERS = ["d3s", "guide", "full-step-dpo"]
"""Methods with planners, notes and states of their own that are in other files."""
SMALL = {"prompts_per_step": 2, "group_size": 4, "learning_rate": 0.1, "steps": 2}


def long(completions, **columns):
    return [float(len(text)) for text in completions]


def odd(completions, **columns):
    return [float(sum(text) % 2) for text in completions]


def run(name, folder=None, steps=2, resume=False, options=None):
    model = sw.exact.markov(symbols=3, length=4, prompts=4, seed=2)
    data = [{"prompt": i, "hinted": 3} for i in range(3)]
    settings = SMALL | {"steps": steps}
    out = {} if folder is None else {"out": folder, "resume": resume, "checkpoint_every": 1}
    method = methods.get(name).recipe(**(options or {}))
    return model, sw.train(model, data, [long, odd], method=method, **settings, **out)


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_every_method_of_credit_trains_with_any_group_size(name):
    before = sw.exact.markov(symbols=3, length=4, prompts=4, seed=2).logits.detach().clone()
    model, found = run(name)
    assert found.steps == 2
    assert bool(model.logits.isfinite().all())
    assert not bool((model.logits.detach() == before).all())


def test_the_price_rises_while_the_constraint_is_broken_and_is_logged():
    _, found = run("constrained-rlhf", steps=3, options={"threshold": 2.0, "rate": 0.1})
    prices = [metrics["state/price"] for metrics in found.history]
    wanted = 0.0
    for metrics, price in zip(found.history, prices, strict=True):
        wanted += 0.1 * (2.0 - metrics["reward/odd"])
        assert price == pytest.approx(wanted, abs=1e-9)


def test_the_shares_of_down_sampling_grow_to_one():
    _, found = run("d3s", steps=3, options={"rows": 0.4, "tokens": 0.6, "updates": 2})
    assert [m["state/rows_kept"] for m in found.history] == pytest.approx([0.7, 1.0, 1.0])
    assert [m["state/tokens_kept"] for m in found.history] == pytest.approx([0.8, 1.0, 1.0])


@pytest.mark.parametrize("name", ["remax", "vineppo", "constrained-rlhf", "guide", "full-step-dpo"])
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(name, tmp_path):
    whole, _ = run(name, tmp_path / "whole", steps=4)
    run(name, tmp_path / "parts", steps=2)
    parts, _ = run(name, tmp_path / "parts", steps=4, resume=True)
    assert bool((whole.logits == parts.logits).all())


def test_a_missing_second_reward_is_named():
    model = sw.exact.markov(symbols=3, length=4, prompts=4, seed=2)
    with pytest.raises(InputError, match=r"RewardColumn\.column must be below the number of .*, 1, got 1"):
        sw.train(model, [{"prompt": 0}], long, method="constrained-rlhf", **SMALL)


@pytest.mark.parametrize("name", ["remax", "otb", "treepo", "vineppo", "guide", "d3s", "empg", "full-step-dpo"])
def test_a_causal_language_model_is_trained_too(small_language, name):
    """Greedy answers, branches and hints go through the caches of a transformer, and scores equal what was stored."""
    model = small_language("qwen2", max_new_tokens=6, dtype="float64")
    before = [parameter.detach().clone() for parameter in model.module.parameters()]
    options = {"segment": 2} if name in ("treepo", "vineppo", "full-step-dpo") else {}
    data = [{"prompt": "a b c", "hinted": "a b c d e"}, {"prompt": "f", "hinted": "f g"}]

    def even(completions, **columns):
        return [float(len(text.split()) % 2) for text in completions]

    found = sw.train(model, data, even, method=methods.get(name).recipe(**options), **SMALL)
    assert found.steps == 2
    assert any(not bool((a == b).all()) for a, b in zip(before, model.module.parameters(), strict=True))
    if name not in ("guide", "d3s", "full-step-dpo"):  # on policy, once: the ratio is one
        assert max(metrics["old_kl"] for metrics in found.history) < 1e-12
