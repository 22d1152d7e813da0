"""The loop does what its settings say: budgets, minibatches, schedules, references, states, stopping."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import stepwell as sw
from stepwell import methods
from stepwell.credit.group import GroupCredit
from stepwell.data.prompts import load_prompts
from stepwell.errors import InputError, UnknownName
from stepwell.objective.policy import Policy
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.state import AdaptiveCoefficient
from stepwell.objective.surrogate import Score
from stepwell.planning.groups import Groups
from stepwell.recipe.recipe import Recipe
from stepwell.reward.mixing import Rewards
from stepwell.training import checkpoint
from stepwell.training.distribute import World
from stepwell.training.loop import Trainer
from stepwell.training.settings import Settings
from stepwell.training.state import begin

PROMPTS = [{"prompt": i} for i in range(6)]


def long(completions, **columns):
    return [float(len(text)) for text in completions]


def model(**changes):
    return sw.exact.markov(**{"symbols": 3, "length": 4, "prompts": 6, "seed": 2, **changes})


def train(method="grpo", **given):
    process = given.pop("process", None) or model()
    settings = {"steps": 4, "learning_rate": 0.05, "prompts_per_step": 6, "group_size": 4, **given}
    return sw.train(process, PROMPTS, long, method, **settings)


def test_training_raises_the_reward():
    process = model()
    before = float(process.expectation(len).detach())
    train("rloo", process=process, steps=30, learning_rate=0.1, group_size=8)
    assert float(process.expectation(len).detach()) > before + 0.3


@pytest.mark.parametrize("method", ["grpo", "ppo", "dpo", "dapo"])
def test_micro_batches_change_memory_and_nothing_else(method):
    whole, cut = train(method), train(method, tokens_per_microbatch=5)
    for one, other in zip(whole.process.module.parameters(), cut.process.module.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


def trainer(recipe=None, **given):
    settings = Settings(**{"steps": 2, "prompts_per_step": 6, "group_size": 4, "learning_rate": 0.1, **given})
    recipe = recipe or methods.get("grpo").recipe()
    return Trainer(begin(model(), recipe, load_prompts(PROMPTS), Rewards(long), settings))


def test_minibatches_cover_every_row_once_an_epoch_and_hold_whole_groups():
    made = trainer(minibatches=4, epochs=3)
    made.collect()
    prompt = made.at.drawn.trajectories.prompt
    orders = []
    for epoch in range(3):
        parts = [made.minibatch(epoch * 4 + place) for place in range(4)]
        assert sorted(torch.cat(parts).tolist()) == list(range(24))
        for part in parts:
            for key in prompt[part].unique():
                assert int((prompt[part] == key).sum()) == 4
        orders.append([part.tolist() for part in parts])
    assert orders[0] != orders[1], "every epoch has an order of its own"


def test_more_minibatches_than_prompts_are_refused():
    with pytest.raises(InputError, match=r"Settings\.minibatches must be at most the 6 prompts of a step, got 7"):
        trainer(minibatches=7)


def test_the_first_update_of_a_rollout_has_ratio_one():
    made = trainer()
    made.collect()
    made.update()
    assert made.at.metrics["old_kl"] < 1e-20
    assert made.at.metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    ("budget", "unit"), [("3-steps", None), ("1k-tokens", "tokens"), ("90-reward-calls", "reward_calls")]
)
def test_a_budget_ends_the_run_once_it_is_spent(budget, unit):
    run = train(budget=budget, steps=None)
    if unit is None:
        assert run.steps == 3
        return
    spent = [
        step["cost/forward"] + step["cost/backward"] if unit == "tokens" else step[f"cost/{unit}"]
        for step in run.history
    ]
    amount = sw.Budget.parse(budget).amount
    assert spent[-1] >= amount > spent[-2]


def test_evaluation_costs_nothing_and_changes_nothing():
    plain = train()
    looked = train(evaluate_every=1, evaluation=PROMPTS[:2], evaluation_samples=3)
    assert torch.equal(plain.process.logits, looked.process.logits)
    for one, other in zip(plain.history, looked.history, strict=True):
        assert other.pop("evaluation/reward") > 0
        assert one == other


def test_schedules_end_at_zero_and_warm_up_from_below():
    settings = Settings(steps=10, learning_rate=1.0, schedule="cosine", warmup=4)
    rates = [settings.learning_rate_at(update, update / 10) for update in range(11)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == pytest.approx(0.0)
    assert Settings(learning_rate=1.0, schedule="linear").learning_rate_at(50, 0.25) == 0.75


def test_a_divergence_from_the_start_grows():
    """From a synced reference it does not."""
    objective = Policy(surrogate=Score()) + Regulariser(Divergence("exact"), 1e-9)
    settled = train(Recipe(objective, Groups(), reference="start"), steps=8).history
    synced = train(Recipe(objective, Groups(), reference="synced"), steps=8).history
    assert settled[0]["kl"] == pytest.approx(0.0, abs=1e-12)
    assert settled[-1]["kl"] > 1e-3
    assert all(step["kl"] < 1e-12 for step in synced)


def test_an_adaptive_coefficient_moves_with_its_metric_and_is_logged():
    state = AdaptiveCoefficient("kl_coefficient", 0.1, metric="kl", target=1e6, rate=0.5)
    history = train(Recipe(Policy(surrogate=Score()) + Regulariser(coefficient=state), Groups())).history
    values = [step["state/kl_coefficient"] for step in history]
    assert values == pytest.approx([0.1 * 0.9 ** (step + 1) for step in range(4)])


def test_the_planner_learns_from_the_rewards_of_its_rows():
    """The recipe's own planner does not change."""
    from stepwell.planning.groups import WeightedPrompts

    planner = WeightedPrompts(high=4.0)
    recipe = Recipe(Policy(), planner)
    made = trainer(recipe)
    made.run(_NoLog())
    assert len(made.state.planner.rates) == 6
    assert planner.rates == {}


class _NoLog:
    def step(self, *arguments):
        pass


def test_a_gradient_that_is_not_finite_moves_nothing():
    made = trainer()
    made.collect()
    made.at.targets["0"]["advantage"][0] = float("inf")
    before = made.state.given.logits.detach().clone()
    made.update()
    assert torch.equal(made.state.given.logits, before)
    assert not torch.isfinite(torch.tensor(made.at.metrics["gradient_norm"]))


def test_ctrl_c_finishes_the_update_writes_a_checkpoint_and_stops(tmp_path):
    def interrupt(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(steps=50, out=tmp_path / "run", on_step=interrupt)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "update-00000002"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(steps=4, out=tmp_path / "run", resume=True)
    assert torch.equal(resumed.process.logits, train(steps=4).process.logits)


def test_the_checkpoint_of_a_run_that_fails_waits_for_no_other_rank(tmp_path, monkeypatch):
    """The others may be waiting somewhere else, or be gone."""
    failed = []

    def gather(self, value):
        assert not failed
        return [value]

    def fail(metrics):
        failed.append(metrics["step"])
        raise KeyboardInterrupt

    monkeypatch.setattr(World, "gather", gather)
    with pytest.raises(KeyboardInterrupt):
        train(steps=3, out=tmp_path / "run", on_step=fail)
    assert failed == [1]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == checkpoint.named(1)


def test_what_on_step_sees_is_what_the_log_keeps_and_the_time():
    seen = []
    run = train(on_step=seen.append)
    assert [{k: v for k, v in step.items() if k != "wall_time"} for step in seen] == run.history
    assert all(step["wall_time"] > 0 for step in seen)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'learning_rate'"):
        train(learning_rte=0.1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": None}, "Settings.steps must be a number where there is no budget, got None"),
        ({"steps": -1}, "Settings.steps must be a whole number, 0 or more, or None, got -1"),
        ({"learning_rate": 0.0}, "Settings.learning_rate must be a finite number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "Settings.learning_rate must be a finite number above 0, got nan"),
        ({"weight_decay": -0.1}, "Settings.weight_decay must be a finite number, 0 or more, got -0.1"),
        ({"max_gradient_norm": 0.0}, "Settings.max_gradient_norm must be a number above 0, got 0.0"),
        ({"group_size": 0}, "Settings.group_size must be a whole number, at least 1, or None, got 0"),
        ({"schedule": "cosin"}, "Settings.schedule must be one of constant, cosine, linear; got 'cosin', did you mean"),
        ({"budget": "60 potatoes"}, "A budget must be like 60s, 5m, 200-steps"),
        ({"budget": 60}, "Settings.budget must be text such as 60s, or a Budget, got 60"),
        ({"steps": "3"}, "Settings.steps must be a whole number, 0 or more, or None, got '3'"),
        ({"group_size": 2.5}, "Settings.group_size must be a whole number, at least 1, or None, got 2.5"),
        ({"keep": True}, "Settings.keep must be a whole number, at least 1, got True"),
        ({"seed": None}, "Settings.seed must be a whole number of 64 bits, got None"),
        ({"seed": 2**64}, "Settings.seed must be a whole number of 64 bits, got 18446744073709551616"),
        ({"learning_rate": "1e-3"}, "Settings.learning_rate must be a finite number above 0, got '1e-3'"),
        ({"trackers": "tensorboard"}, "Settings.trackers must be a list of names, got 'tensorboard'"),
        ({"method": 3}, "method must be an id or a Recipe, got a int"),
        (
            {"method": Recipe(Policy(GroupCredit("mean"))), "options": {"clip": 0.1}},
            "options must be left out for a Recipe",
        ),
        (
            {"method": Recipe(Policy(GroupCredit("mean"))), "group_size": 1},
            "Settings.group_size must be at least 2 for GroupCredit, which compares the samples of a prompt, got 1",
        ),
        ({"process": "path/to/a/model"}, "must be a process, such as language"),
        ({"evaluation": PROMPTS}, "evaluation and evaluate_every must be given together"),
        ({"evaluate_every": 1}, "evaluation and evaluate_every must be given together"),
    ],
)
def test_a_wrong_argument_is_one_clear_sentence(given, said):
    with pytest.raises(InputError) as caught:
        train(**given)
    assert said in str(caught.value)


def test_a_gradient_may_be_left_as_long_as_it_is():
    assert Settings(max_gradient_norm=float("inf")).max_gradient_norm == float("inf")
    assert Settings(seed=-(2**63)).seed == -(2**63)


@pytest.mark.parametrize("reward", ["my.py:reward", None, 3])
def test_what_is_no_reward_is_refused(reward):
    with pytest.raises(InputError, match="A reward must be a function"):
        sw.train(model(), PROMPTS, reward, steps=1)


def test_several_rewards_are_weighted_and_logged_one_by_one():
    def twos(completions, **columns):
        return [None if 2 not in text else 1.0 for text in completions]

    run = sw.train(model(), PROMPTS, Rewards([long, twos], [1.0, 0.5]), "grpo", steps=1, group_size=4)
    step = run.history[0]
    assert {"reward/long", "reward/twos"} <= set(step)
    assert step["reward/twos"] == 1.0, "the mean is over the rows a reward applies to"


def test_a_second_run_of_one_process_has_a_budget_of_its_own():
    process = model()
    first, second = (train(process=process, budget="1k-tokens", steps=None) for _ in range(2))
    assert second.steps >= 1
    assert second.cost.forward < 2 * first.cost.forward
