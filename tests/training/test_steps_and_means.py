"""Numbers that a run reports: means over updates and prompts, seconds of phases, and which limit ends it."""

from __future__ import annotations

import time

import pytest
import torch

import stepwell as sw
from stepwell import methods
from stepwell.check.tolerance import tolerance
from stepwell.data.prompts import load_prompts
from stepwell.objective.policy import Policy
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.surrogate import Score
from stepwell.planning.groups import DynamicSampling, Groups
from stepwell.process.exact.table import TabularLanguage
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Request
from stepwell.sampling.rollout import rollout
from stepwell.training.loop import Trainer
from stepwell.training.settings import Settings
from stepwell.training.state import begin

PROMPTS = [{"prompt": number} for number in range(5)]
SMALL = {"steps": 3, "learning_rate": 0.1, "prompts_per_step": 4, "group_size": 3}


def uneven(completions, **columns):
    return [float(len(text)) + 0.1 * text.count(2) for text in completions]


def model(**changes):
    return sw.exact.markov(**{"symbols": 3, "length": 4, "prompts": 5, "seed": 3, **changes})


def train(method="grpo", process=None, reward=uneven, **given):
    return sw.train(process or model(), PROMPTS, reward, method, **{**SMALL, **given})


def trainer(recipe=None, process=None, reward=uneven, **given):
    recipe = recipe or methods.get("grpo").recipe()
    settings = Settings(**{**SMALL, **given})
    return Trainer(begin(process or model(), recipe, load_prompts(PROMPTS), Rewards(reward), settings))


class Kept:
    """A log and a view that keep what they are given."""

    def __init__(self):
        self.lines, self.clocks = [], []

    def step(self, metrics, clock, *others):
        self.lines.append(metrics)
        self.clocks.append(clock)


# means


class FewGroups(Groups):
    """Groups that end with one prompt less than there are minibatches."""

    def ask(self, prompts, count, weights=None):
        return super().ask(prompts, count, weights)[:2]


@pytest.mark.parametrize("planner", [Groups(), FewGroups()])
def test_logged_metrics_are_means_over_the_updates_of_a_step(planner):
    """A minibatch without rows is no update."""
    recipe = methods.get("grpo").recipe(kl=0.1).replace(planner=planner, minibatches=3, epochs=2)
    made, log = trainer(recipe), Kept()
    for step in (1, 2):  # the second step's means hold nothing of the first's
        made.collect()
        each = []
        for _ in range(6):
            earlier, updates = dict(made.at.metrics), made.at.update
            made.update()
            if made.at.update > updates:
                each.append({name: value - earlier.get(name, 0.0) for name, value in made.at.metrics.items()})
        assert len(each) == (4 if isinstance(planner, FewGroups) else 6)
        made.finish_step(log, Kept())
        line = log.lines[-1]
        assert line["updates"] == step * len(each)
        for name in ("gradient_norm", "kl", "old_kl", "clip_fraction"):
            assert line[name] == pytest.approx(sum(update[name] for update in each) / len(each), rel=1e-9), name
        assert line["gradient_norm"] > 0
        assert line["kl"] > 0


@pytest.mark.parametrize("samples", [1, 3])
def test_the_evaluation_is_the_mean_reward_over_held_out_prompts(samples):
    held_out = [{"prompt": number, "worth": worth} for number, worth in enumerate([1.0, 4.0, 10.0])]
    training = [{"prompt": number, "worth": 0.0} for number in range(5)]

    def worth(completions, worth, **columns):
        return [float(value) for value in worth]

    given = {**SMALL, "evaluation": held_out, "evaluate_every": 2, "evaluation_samples": samples}
    history = sw.train(model(), training, worth, "reinforce", **given).history
    assert ["evaluation/reward" in line for line in history] == [False, True, False]
    assert history[1]["evaluation/reward"] == pytest.approx(5.0)


def test_an_evaluation_is_the_mean_of_its_prompts_means():
    from stepwell.training.evaluation import evaluate

    process = model()
    found = evaluate(process, load_prompts(PROMPTS), Rewards(uneven), Rng(1), samples=4)
    rows = found.drawn.trajectories
    for number, mean in enumerate(found.each.tolist()):
        own = [uneven([value])[0] for value in found.drawn.samples.values[4 * number : 4 * number + 4]]
        assert set(rows.prompt[4 * number : 4 * number + 4].tolist()) == {number}
        assert mean == pytest.approx(sum(own) / 4)
    assert found.reward == pytest.approx(float(found.each.mean()))
    assert found.each.std() > 0
    assert process.meter.spent.forward == 0


# which limit ends a run


@pytest.mark.parametrize(
    ("steps", "budget", "made"), [(2, "1M-tokens", 2), (2, "3-steps", 2), (5, "3-steps", 3), (3, "3-steps", 3)]
)
def test_of_steps_and_a_budget_the_first_that_is_reached_ends_the_run(steps, budget, made):
    assert train(steps=steps, budget=budget).steps == made


def test_a_budget_below_the_steps_ends_the_run_once_it_is_spent():
    run = train(steps=50, budget="60-reward-calls")
    assert [line["cost/reward_calls"] for line in run.history] == [12, 24, 36, 48, 60]


def test_the_share_that_is_over_is_that_of_the_nearer_limit():
    """The learning rate falls to nothing towards the limit that ends the run."""
    rates = [line["learning_rate"] for line in train(steps=100, budget="4-steps", schedule="linear").history]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


# seconds


def test_seconds_of_phases_add_up_and_stay_below_the_steps():
    """A reward takes its time; a planner that asks again adds to the phases of the same step."""
    calls = []

    def slow(completions, **columns):
        calls.append(len(completions))
        time.sleep(0.02)
        return [float(len(calls) > 1 and place % 2) for place in range(len(completions))]

    recipe = methods.get("dapo").recipe().replace(planner=DynamicSampling(prompts=2, size=2))
    made = trainer(recipe, reward=slow, steps=2, prompts_per_step=2, group_size=2)
    log = Kept()
    begun = time.monotonic()
    made.run(log)
    passed = time.monotonic() - begun
    assert len(calls) > 2, "the first prompts were all tied, so that more were asked for"
    clocks = [clock["seconds"] for clock in log.clocks]
    total = 0.0
    for clock in clocks:
        phases = {name: value for name, value in clock.items() if name not in ("step", "wall_time")}
        assert phases.keys() >= {"rollout", "reward", "score"}
        assert min(phases.values()) >= 0.0
        assert sum(phases.values()) <= clock["step"]
        total += clock["step"]
    assert sum(clock["reward"] for clock in clocks) >= 0.02 * len(calls)
    assert clocks[0]["reward"] >= 0.04
    assert sum(clock["rollout"] for clock in clocks) <= passed - 0.02 * len(calls)
    assert total <= passed
    assert clocks[0]["wall_time"] <= clocks[1]["wall_time"] <= passed + clocks[0]["wall_time"]


# ratio one


class Drifted(TabularLanguage):
    """Steps are drawn from other probabilities than `score` gives, as another engine's are."""

    def propose(self, state):
        distribution = super().propose(state)
        return type(distribution)(distribution.logits * 0.8)


@pytest.mark.parametrize("anew", [{"old": "recomputed"}, {"precision": "bf16"}, {}])
def test_the_first_ratio_is_one_where_old_log_probs_are_scored_anew(anew):
    process = Drifted(model().logits.detach(), 4)
    recipe = methods.get("grpo").recipe()
    if "old" in anew:
        recipe = recipe.replace(old=anew["old"])
    made = trainer(recipe, process, **({"precision": "bf16"} if "precision" in anew else {}))
    made.collect()
    made.update()
    if anew:
        assert made.at.metrics["old_kl"] == pytest.approx(0.0, abs=1e-15)
        assert made.at.metrics["clip_fraction"] == 0.0
    else:
        assert made.at.metrics["old_kl"] > 1e-4


def test_a_transformer_in_bf16_begins_at_ratio_one(small_language):
    process = small_language(max_new_tokens=5, dtype="float32")
    text = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    settings = Settings(steps=1, prompts_per_step=3, group_size=4, precision="bf16")
    prompts = load_prompts([{"prompt": text} for text in ("a b c d e", "f", "g h")])
    made = Trainer(begin(process, methods.get("grpo").recipe(), prompts, Rewards(text), settings))
    made.collect()
    rows = made.at.drawn.trajectories
    made.update()
    coarse = tolerance(process.module, torch.bfloat16)
    assert float(((rows.old_log_prob - rows.log_prob) * rows.mask).abs().max()) < 10 * coarse
    assert made.at.metrics["old_kl"] < coarse**2
    assert made.at.metrics["clip_fraction"] == 0.0


# greedy answers, references


def test_the_greedy_reward_of_remax_is_its_own_prompts():
    process = model()

    def judged(completions, prompts, **columns):
        return [100.0 * prompt + value for prompt, value in zip(prompts, uneven(completions), strict=True)]

    made = trainer(methods.get("remax").recipe(), process, judged)
    made.collect()
    rows = made.at.drawn.trajectories
    assert rows.prompt.unique().tolist() != rows.prompt.tolist(), "prompts come in no order, each several times"
    greedy = {}
    for prompt in load_prompts(PROMPTS):
        (text,) = rollout(process, [Request(prompt, 1, window=(0, 0))], Rng(9)).samples.values
        greedy[prompt.id] = judged([text], [prompt.value])[0]
    assert rows.info["greedy"].tolist() == pytest.approx([greedy[number] for number in rows.prompt.tolist()])
    assert len(set(rows.info["greedy"].tolist())) == len(rows.prompt.unique())


def cut_back(whole, copy, name):
    import shutil

    shutil.copytree(whole, copy)
    for other in (copy / "checkpoints").iterdir():
        if other.name > name:
            shutil.rmtree(other)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_run_with_a_synced_reference_resumes_alike_with_more_steps_after(every, tmp_path):
    """The reference that it goes on with is that of the last sync, not of the start nor of the checkpoint."""
    objective = Policy(surrogate=Score()) + Regulariser(Divergence("exact"), 0.5)
    recipe = Recipe(objective, Groups(), epochs=2, reference="synced", sync_every=every)

    def go(out, resume=False):
        given = {"steps": 7, "checkpoint_every": 1, "keep": 1000, "weight_decay": 0.01}
        return train(recipe, out=out, resume=resume, **given)

    run = go(tmp_path / "whole")
    for name in ("update-00000002", "update-00000005", "update-00000008"):
        cut_back(tmp_path / "whole", tmp_path / name, name)
        again = go(tmp_path / name, resume=True)
        assert torch.equal(run.process.logits, again.process.logits), name
        assert (tmp_path / name / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert max(line["kl"] for line in run.history) > 1e-6


def test_a_synced_reference_is_renewed_after_as_many_steps_as_it_says():
    objective = Policy(surrogate=Score()) + Regulariser(Divergence("exact"), 1e-9)
    history = train(Recipe(objective, Groups(), reference="synced", sync_every=3), steps=7).history
    assert [line["kl"] > 1e-6 for line in history] == [False, True, True, False, True, True, False]
