"""The models of a run: the caller's stays as it was, and a teacher is there where it is read and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch

import stepwell as sw
from stepwell.errors import InputError, MissingAbility
from stepwell.objective.policy import Policy
from stepwell.planning.groups import Groups
from stepwell.process.exact.table import TabularLanguage
from stepwell.recipe.recipe import Recipe

PROMPTS = [{"prompt": number} for number in range(2)]


def long(completions, **columns):
    return [float(len(text)) for text in completions]


def tabular():
    return sw.exact.markov(symbols=3, length=3, prompts=2, seed=1)


def train(process, method, prompts=PROMPTS, **given):
    settings = {"steps": 2, "learning_rate": 0.05, "prompts_per_step": 2, "group_size": 2}
    return sw.train(process, prompts, long, method, **{**settings, **given})


def seen(process):
    """The attributes of a process, the names of its parameters, its meter and its module."""
    own = {name: id(value) for name, value in vars(process).items()}
    return own, list(process.module.state_dict()), id(process.meter), id(process.module)


@pytest.mark.parametrize(("method", "options"), [("grpo", {"kl": 0.1}), ("ppo", {}), ("ppo", {"kl": 0.1}), ("dpo", {})])
def test_the_callers_table_has_no_new_attribute_and_no_value_head(method, options):
    process = tabular()
    before, logits = seen(process), process.logits.detach().clone()
    value = process.module.get_parameter("value").detach().clone()
    run = train(process, method, options=options)
    assert seen(process) == before
    assert not torch.equal(process.logits, logits), "its parameters are those that were trained"
    assert torch.equal(process.module.get_parameter("value"), value)
    assert not process.module.get_parameter("value").requires_grad
    assert process.meter.spent.forward == run.cost.forward > 0


@pytest.mark.parametrize(
    ("method", "options"), [("ppo", {"kl": 0.1}), pytest.param("grpo", {"kl": 0.1}, marks=pytest.mark.slow)]
)
def test_the_callers_transformer_has_no_new_attribute_and_no_value_head(method, options, small_language):
    process = small_language(max_new_tokens=3, dtype="float32")
    before = seen(process)
    run = train(process, method, ["a b", "c"], options=options)
    assert seen(process) == before
    assert process.network.value_head is None
    assert "value" not in process.offers
    assert (run.process is process) == (method == "grpo")


def test_a_teacher_is_not_written_on_and_spends_on_the_runs_meter():
    process, teacher = tabular(), sw.exact.markov(symbols=3, length=3, prompts=2, seed=2)
    before = seen(teacher)
    state = copy.deepcopy(teacher.module.state_dict())
    alone = train(tabular(), "grpo").cost.forward
    run = train(process, "on-policy-distillation", teacher=teacher)
    assert seen(teacher) == before
    assert all(torch.equal(value, state[name]) for name, value in teacher.module.state_dict().items())
    assert teacher.meter.spent.forward == 0
    assert run.cost.forward > alone


class Unheard(TabularLanguage):
    """Nothing may be drawn from it."""

    def start(self, prompts, rng):
        raise AssertionError("drawn too early")


def unheard():
    return Unheard(tabular().logits.detach(), 3)


@pytest.mark.parametrize("method", ["on-policy-distillation", "gkd", "tgdpo"])
def test_a_method_that_needs_a_teacher_says_so_before_anything_is_drawn(method):
    with pytest.raises(MissingAbility, match="needs another model to learn from; give `teacher=`"):
        train(unheard(), method)


@pytest.mark.parametrize("method", ["grpo", "ppo", "dpo"])
def test_a_teacher_that_nobody_reads_is_refused_before_anything_is_drawn(method):
    with pytest.raises(InputError, match="teacher must be left out: no part of the method reads a teacher"):
        train(unheard(), method, teacher=tabular())


# the process of a finished run


class Tempered(TabularLanguage):
    """A table at a temperature: one that can be drawn from otherwise, and has a value head."""

    temperature = 1.0

    def with_sampler(self, temperature):
        twin = copy.copy(self)
        twin.temperature = temperature
        return twin

    def propose(self, state):
        distribution = super().propose(state)
        return type(distribution)(distribution.logits / self.temperature)

    def score(self, trajectories, needs=(), context=None, reference=None):
        assert self.temperature == 3.0, "rows are scored under the sampler that drew them"
        cooler = copy.copy(self)
        cooler.module = _Scaled(self.module, self.temperature)
        return TabularLanguage.score(cooler, trajectories, needs, context, reference)


class _Scaled:
    """Tables whose logits are divided by a temperature."""

    def __init__(self, module, temperature):
        self.module, self.temperature = module, temperature

    def get_parameter(self, name):
        parameter = self.module.get_parameter(name)
        return parameter / self.temperature if name == "logits" else parameter


def test_a_policy_with_a_head_and_another_sampler_comes_back_as_given():
    """It draws as the caller's, and has the value head that was trained."""
    process = Tempered(tabular().logits.detach(), 3)
    recipe = sw.methods.get("ppo").recipe().replace(sampler={"temperature": 3.0})
    run = train(process, recipe)
    assert process.temperature == run.process.temperature == 1.0
    assert run.process.logits is process.logits
    value = run.process.module.get_parameter("value")
    assert value.requires_grad
    assert bool((value != 0).any()), "the head was trained"
    assert not process.module.get_parameter("value").requires_grad


def test_a_process_without_a_value_head_of_its_own_comes_back_itself():
    process = tabular()
    assert train(process, Recipe(Policy(), Groups(2, 2))).process is process


def test_a_teacher_of_other_symbols_is_refused_before_anything_is_drawn():
    process = tabular()
    with pytest.raises(InputError, match="teacher must be a table of 3 symbols"):
        train(process, "gkd", teacher=sw.exact.markov(symbols=4, length=3, prompts=2))
    assert process.meter.spent.forward == 0


def test_a_teacher_with_other_tokens_is_refused(small_language):
    process, teacher = (small_language(max_new_tokens=3, dtype="float32") for _ in range(2))
    process.check_teacher(teacher)
    teacher = copy.copy(teacher)
    teacher.tokenizer = copy.deepcopy(teacher.tokenizer)
    teacher.tokenizer.add_tokens(["one-more"])
    with pytest.raises(InputError, match="teacher must have the model's tokens"):
        process.check_teacher(teacher)
    with pytest.raises(InputError, match="teacher must have the model's tokens"):
        process.check_teacher(tabular())
