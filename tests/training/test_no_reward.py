"""A method that reads no reward asks for none, and a method that reads one does not begin without it."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from dataclasses import dataclass

import pytest

import stepwell as sw
import stepwell.credit
import stepwell.objective
from stepwell import Request, methods
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.objective.policy import Policy
from stepwell.parts import Constant, Node, parts_of
from stepwell.planning.groups import DynamicSampling, Groups
from stepwell.reward.absent import NoRewards
from stepwell.sampling.request import Completion

SIZES = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "learning_rate": 0.1}
PROMPTS = [{"prompt": number} for number in range(4)]
TEACHERS = ("gkd", "on-policy-distillation")


def model(seed: int = 0):
    return sw.exact.markov(symbols=3, length=3, prompts=4, seed=seed)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("reward", [None, [], ()])
def test_a_method_without_rewards_needs_none(name, reward, tmp_path):
    run = sw.train(model(), PROMPTS, reward, name, teacher=model(3), out=tmp_path / "run", **SIZES)
    assert run.steps == 2
    assert not any("reward" in metric for metrics in run.history for metric in metrics if "cost" not in metric)
    assert all({"length", "truncated", "gradient_norm"} <= metrics.keys() for metrics in run.history)
    lines = (tmp_path / "run/completions.jsonl").read_text().splitlines()
    assert lines
    assert not any("reward" in json.loads(line) for line in lines)
    assert run.cost.reward_calls == 0


@pytest.mark.parametrize("name", TEACHERS)
def test_a_reward_that_is_given_to_it_is_logged_and_changes_nothing(name):
    def ones(completions):
        return [float(text.count(1)) for text in completions]

    with_one, without = (sw.train(model(), PROMPTS, reward, name, teacher=model(3), **SIZES) for reward in (ones, None))
    assert "reward" in with_one.history[-1]
    for first, second in zip(with_one.process.module.parameters(), without.process.module.parameters(), strict=True):
        assert first.equal(second)


def test_methods_that_read_rewards_are_told_from_those_that_do_not_by_their_parts():
    assert {name for name in methods.names() if not methods.get(name).recipe().rewarded} == set(TEACHERS)
    imitation = sw.Recipe(Policy(Constant()))
    assert not imitation.rewarded
    assert imitation.replace(credit_of=GroupCredit("mean")).rewarded
    assert imitation.replace(planner=DynamicSampling()).rewarded


@pytest.mark.parametrize("name", ["grpo", "dpo", "ppo", "trajectory-balance", "kdrl", "hpt", "remax"])
def test_a_method_that_reads_rewards_does_not_begin_without(name, tmp_path):
    teacher = model(3) if name == "kdrl" else None
    with pytest.raises(InputError, match="got none; the method learns from rewards"):
        sw.train(model(), PROMPTS, None, name, teacher=teacher, out=tmp_path / "run", **SIZES)
    assert not (tmp_path / "run").exists()


def nodes_that_mention_rewards():
    """Every part of a method whose code reads the rewards of a batch."""
    for room in (stepwell.credit, stepwell.objective):
        for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            module = importlib.import_module(found.name)
            for _, kind in inspect.getmembers(module, inspect.isclass):
                mine = kind.__module__ == module.__name__ and issubclass(kind, Node) and not inspect.isabstract(kind)
                if mine and ("batch.reward" in inspect.getsource(kind) or '"rewards"' in inspect.getsource(kind)):
                    yield kind


@pytest.mark.parametrize("kind", list(nodes_that_mention_rewards()), ids=lambda kind: kind.__name__)
def test_a_part_that_reads_a_reward_declares_it(kind):
    """An undeclared one would fail in the midst of a run that was not asked for a reward."""
    assert any(part.rewarded for part in parts_of(kind()) if isinstance(part, Node))


def test_there_are_parts_that_read_rewards():
    assert len(list(nodes_that_mention_rewards())) > 10


def test_the_policy_itself_needs_no_reward():
    run = sw.train(model(), PROMPTS, None, sw.Recipe(Policy(Constant())), **SIZES)
    assert "reward" not in run.history[-1]


def test_pairs_that_the_data_have_judged_need_no_reward():
    @dataclass
    class Stored(Groups):
        """Each prompt's chosen and rejected answers, with their rewards."""

        judged = True

        def ask(self, prompts, count, weights=None):
            sides = (("chosen", 1.0), ("rejected", 0.0))
            return [
                Request(prompt, 1, start=Completion(prompt.columns[name]), reward=reward, source=1)
                for prompt in prompts.take(count, weights)
                for name, reward in sides
            ]

    rows = [{**row, "chosen": (1, 1, 1), "rejected": (2, 2, 2)} for row in PROMPTS]
    recipe = methods.get("dpo").recipe().replace(planner=Stored(prompts=2, size=2))
    run = sw.train(model(), rows, None, recipe, steps=20, learning_rate=0.1)
    assert run.history[-1]["pair_accuracy"] == 1.0
    assert run.history[-1]["pair_loss"] < run.history[0]["pair_loss"]
    assert run.history[-1]["demonstrations/reward"] == 0.5


def test_an_evaluation_needs_a_reward():
    with pytest.raises(InputError, match="reward must be given where there is an evaluation"):
        sw.train(model(), PROMPTS, None, "gkd", teacher=model(3), evaluation=PROMPTS, evaluate_every=1, **SIZES)


def test_a_run_without_rewards_resumes(tmp_path):
    for more in ({"steps": 2}, {"steps": 4, "resume": True}):
        run = sw.train(model(), PROMPTS, None, "gkd", teacher=model(3), out=tmp_path / "run", **{**SIZES, **more})
    whole = sw.train(model(), PROMPTS, None, "gkd", teacher=model(3), **{**SIZES, "steps": 4})
    assert run.history == whole.history


def test_no_rewards_are_rewards_of_no_function():
    assert (NoRewards().functions, NoRewards().names, NoRewards().weights) == ((), (), ())
