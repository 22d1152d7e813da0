"""Windows of random steps in rollouts: masks, shared pasts, unjudged rows; runs that plan by them, resumed or split."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn

import stepwell as sw
from stepwell import methods
from stepwell.check import law
from stepwell.data.stream import PromptStream
from stepwell.errors import InputError, MissingAbility
from stepwell.meter import Meter
from stepwell.planning.branches import Branches
from stepwell.planning.windows import Windows
from stepwell.process.exact.table import markov
from stepwell.process.flow.build import flow
from stepwell.process.flow.process import Flow
from stepwell.reward.mixing import Rewards
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.training.collect import collect

MODEL = markov(symbols=2, length=3, prompts=2, end=False, seed=1)
FIRST, SECOND = Prompt(0, 0), Prompt(1, 1)
STEPS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=torch.float64)
        for place, parameter in enumerate(self.parameters()):
            parameter.data.copy_(Rng(1).split(place).normal(*parameter.shape, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.linear(torch.cat([x, time[:, None]], 1)).tanh() + 0.1 * label[:, None]


def small(**settings) -> Flow:
    return flow(Net(), (1,), **{"solver": "sde-flow", "steps": STEPS, "encode": "label"} | settings)


def likeliest(prompt: int, *text: int) -> int:
    state = MODEL.start([prompt], Rng(0))
    for symbol in text:
        state = MODEL.advance(state, torch.tensor([symbol]), Rng(0))
    return int(MODEL.deterministic(state).value)


def chance(prompt: int, *text: int) -> list[float]:
    state = MODEL.start([prompt], Rng(0))
    for symbol in text:
        state = MODEL.advance(state, torch.tensor([symbol]), Rng(0))
    return MODEL.propose(state).probabilities[0].tolist()


# what a window is


@pytest.mark.parametrize("window", [(0, 3), (0, 1), (1, 2), (1, 3), (2, 3), (0, 0), (3, 9)])
def test_a_window_of_a_language_model_is_greedy_outside_and_exact_inside(window):
    expected = {(): 1.0}
    for step in range(3):
        following = {}
        for text, probability in expected.items():
            if window[0] <= step < window[1]:
                for symbol, p in enumerate(chance(0, *text)):
                    following[(*text, symbol)] = probability * p
            else:
                following[(*text, likeliest(0, *text))] = probability
        expected = following
    found = law(lambda rng: rollout(MODEL, [Request(FIRST, 1, window=window)], rng))
    assert found == pytest.approx({(text,): p for text, p in expected.items()}, abs=1e-14)
    rows = rollout(MODEL, [Request(FIRST, 3, window=window)], Rng(0)).trajectories
    assert rows.mask.tolist() == [[window[0] <= step < window[1] for step in range(3)]] * 3
    assert not rows.log_prob[~rows.mask].any()
    with torch.no_grad():
        assert float((MODEL.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-14


def test_a_planted_window_off_by_one_has_another_distribution():
    right, wrong = (0, 1), (1, 2)
    found = [law(lambda rng, w=w: rollout(MODEL, [Request(FIRST, 1, window=w)], rng)) for w in (right, wrong)]
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_no_window_is_a_window_of_everything():
    for process in (MODEL, small()):
        plain, wide = (rollout(process, [Request(FIRST, 3, window=w)], Rng(0)).trajectories for w in (None, (0, 99)))
        for name in ("action", "log_prob", "mask", "node", "length"):
            assert torch.equal(getattr(plain, name), getattr(wide, name))


def test_requests_with_windows_of_their_own_come_back_in_their_order():
    windows = [(1, 2), None, (2, 4), (1, 2), (3, 3)]
    requests = [Request(Prompt(place, place % 2), 2, window=window) for place, window in enumerate(windows)]
    drawn = rollout(small(), requests, Rng(0), rows_at_once=4)
    assert drawn.trajectories.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row, place in enumerate(drawn.trajectories.prompt.tolist()):
        begin, end = windows[place] or (0, 99)
        assert drawn.trajectories.mask[row].tolist() == [
            max(begin, 1) <= step < min(end, STEPS) for step in range(STEPS + 1)
        ]
    nodes = drawn.trajectories.node
    assert len(nodes.unique()) == nodes.numel()


@pytest.mark.parametrize("window", [(2, 1), (-1, 2)])
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(InputError, match="0 <= begin <= end"):
        Request(FIRST, 1, window=window)


class Bare:
    """A process without the abilities that windows and samplers ask for."""

    def __init__(self):
        self.module, self.meter = nn.Module(), Meter()
        self.start, self.propose, self.advance = MODEL.start, MODEL.propose, MODEL.advance
        self.finish, self.condition = MODEL.finish, MODEL.condition


def test_processes_without_the_ability_are_named():
    with pytest.raises(MissingAbility, match="needs a process with deterministic; Bare has none"):
        rollout(Bare(), [Request(FIRST, 1, window=(1, 2))], Rng(0))
    with pytest.raises(MissingAbility, match="needs a process with with_sampler; Bare has none"):
        rollout(Bare(), [Request(FIRST, 1, sampler={"steps": 2})], Rng(0))
    rollout(Bare(), [Request(FIRST, 1, window=(0, 3))], Rng(0))


# branches and what they keep of their past


def test_a_branch_keeps_the_mask_of_its_past_inside_its_window_alone():
    for process, free in ((MODEL, 0), (small(), 1)):
        trunk = rollout(process, [Request(FIRST, 1)], Rng(0)).trajectories
        steps = trunk.mask.shape[1]
        for window in (None, (1, 2), (2, 3), (free, 2), (0, 0)):
            request = Request(FIRST, 2, start=(0, 2), window=window)
            rows = rollout(process, [request], Rng(1), so_far=trunk).trajectories
            inside = [window is None or window[0] <= step < window[1] for step in range(steps)]
            assert rows.mask.tolist() == [(trunk.mask[0] & torch.tensor(inside)).tolist()] * 2
            assert not rows.log_prob[~rows.mask].any()
            assert torch.equal(rows.action[:, :2], trunk.action[:, :2].expand_as(rows.action[:, :2]))
            assert torch.equal(rows.node[:, :2], trunk.node[:, :2].expand(2, 2)), "shared whether trained or not"
            assert len(rows.node[:, 2:].unique()) == 2 * (steps - 2)
            with torch.no_grad():
                assert float((process.score(rows).log_prob - rows.log_prob).abs().max()) < 1e-12


def test_a_deterministic_step_of_the_trunk_is_not_trained_by_a_branch():
    """Not even by one whose window has it."""
    process = small()
    trunk = rollout(process, [Request(FIRST, 1, window=(0, 0))], Rng(0)).trajectories
    rows = rollout(process, [Request(FIRST, 2, start=(0, 3))], Rng(1), so_far=trunk).trajectories
    assert rows.mask.tolist() == [[False, False, False, True, False]] * 2


def test_branches_go_on_from_the_state_itself():
    """A branch in a window of nothing repeats its trunk, also for solvers that remember."""
    for solver in ("sde-flow", "sde-dpmpp-2m", "dpmpp-2m", "heun"):
        process = small(solver=solver)
        trunk = rollout(process, [Request(FIRST, 1, window=(0, 0))], Rng(0)).trajectories
        for step in range(1, STEPS + 1):
            request = Request(FIRST, 1, start=(0, step), window=(0, 0))
            again = rollout(process, [request], Rng(1), so_far=trunk).trajectories
            torch.testing.assert_close(again.action, trunk.action, rtol=0, atol=1e-13)


def test_a_horizon_and_a_window_go_together():
    drawn = rollout(small(), [Request(FIRST, 2, window=(1, 2), horizon=3)], Rng(0))
    assert drawn.trajectories.length.tolist() == [3, 3]
    assert drawn.trajectories.truncated.all()
    assert drawn.trajectories.mask.tolist() == [[False, True, False]] * 2


def test_a_branch_may_take_another_sampler_from_there_on():
    process = small()
    trunk = rollout(process, [Request(FIRST, 1)], Rng(0)).trajectories
    request = Request(FIRST, 2, start=(0, 2), window=(0, 2), sampler={"tail": (1, "ddim", 1)})
    drawn = rollout(process, [request], Rng(1), so_far=trunk)
    rows = drawn.trajectories
    assert rows.length.tolist() == [3, 3]
    x, t = rows.action[:, 1], process.sampler.times[1]
    with torch.no_grad():
        data = x - t * process.module(x, x.new_full((2,), t), torch.zeros(2))
    torch.testing.assert_close(rows.action[:, 2], data, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.stack(drawn.samples.values), data, rtol=0, atol=1e-13)


# rows that are there to branch from


def test_unjudged_rows_have_no_outcome_and_no_sample():
    """Nor do they cost an evaluation for their end, or a reward call."""
    process = small()
    judged = []

    def finish(state):
        judged.append(len(state))
        return Flow.finish(process, state)

    process.finish = finish
    cut = Request(FIRST, 3, horizon=2, judged=False)
    drawn = rollout(process, [Request(SECOND, 2), cut, Request(FIRST, 1, judged=False)], Rng(0))
    assert judged == [2]
    assert drawn.trajectories.outcome.tolist() == [True, True, False, False, False, False]
    assert drawn.trajectories.prompt.tolist() == [1, 1, 0, 0, 0, 0]
    assert drawn.samples.values[2:] == [None] * 4
    assert process.meter.spent.model_evaluations == 2 * STEPS + 3 * 1 + STEPS, "a cut row's end would cost one more"


def test_unjudged_rows_cost_no_reward_call_and_earn_nothing():
    process, asked = small(), []

    def reward(completions):
        asked.append(len(completions))
        return [5.0] * len(completions)

    class Mixed(Windows):
        def plan(self, step, so_far, prompts):
            return [] if so_far is not None else [Request(FIRST, 2, judged=False), Request(SECOND, 3)]

    stream = PromptStream([FIRST, SECOND], Rng(0))
    drawn = collect(process, Mixed(2, 2), stream, Rewards(reward), Rng(0), 0).drawn
    assert asked == [3]
    assert process.meter.spent.reward_calls == 3
    assert drawn.trajectories.reward.tolist() == [0.0, 0.0, 5.0, 5.0, 5.0]
    assert drawn.trajectories.rewards.tolist() == [[0.0]] * 2 + [[5.0]] * 3


def test_a_rollout_of_unjudged_rows_alone_asks_nobody():
    def reward(completions):
        raise AssertionError("nothing is to be judged")

    class Trunks(Windows):
        def plan(self, step, so_far, prompts):
            return [] if so_far is not None else [Request(FIRST, 2, judged=False)]

    drawn = collect(small(), Trunks(1, 2), PromptStream([FIRST], Rng(0)), Rewards(reward), Rng(0), 0).drawn
    assert drawn.trajectories.reward.tolist() == [0.0, 0.0]


# language runs


def test_windows_and_branches_are_plans_for_language_models_too():
    def symbols(completions, **columns):
        return [float(sum(text)) for text in completions]

    for planner in (
        Windows(2, 4, steps=3, width=1, schedule="progressive", hold=1, first=0),
        Branches(2, 4, (0, 1), first=0),
    ):
        model = markov(symbols=3, length=3, prompts=2, end=False, seed=1)
        recipe = methods.get("rloo").recipe().replace(planner=planner)
        run = sw.train(model, [{"prompt": 0}, {"prompt": 1}], symbols, recipe, steps=40, learning_rate=0.1, seed=2)
        first, last = (sum(step["reward"] for step in part) for part in (run.history[:6], run.history[-6:]))
        assert last > first, type(planner).__name__


# runs


PLANNED = {
    "mix-grpo": {"steps": 5, "window": 2, "hold": 1, "flash": 0.5},
    "flow-grpo": {"steps": 5, "window": 2},
    "g2rpo": {"steps": 4, "branches": 2, "size": 2},
    "dynamic-treerpo": {"steps": 4, "depth": 2, "hold": 1},
    "b2-diffurl": {"steps": 4, "least": 2, "hold": 1},
    "spo": {"steps": 4, "candidates": 3},
    "euphonium": {"steps": 4, "beta": 5.0},
}


def closeness(completions):
    points = completions if isinstance(completions, Tensor) else torch.stack(list(completions))
    return -(points - 1.0).square().sum(1)


def trained(method, out, resume=False):
    settings = {"steps": 3, "learning_rate": 0.01, "prompts_per_step": 2, "seed": 3, "schedule": "linear"}
    settings |= {"checkpoint_every": 1, "keep": 1000, "epochs": 2, "minibatches": 2}
    prompts = [{"prompt": number} for number in range(3)]
    process = flow(Net(), (1,), encode="label", steps=3)
    return sw.train(process, prompts, closeness, method, options=PLANNED[method], out=out, resume=resume, **settings)


@pytest.mark.parametrize("method", PLANNED)
def test_runs_that_plan_windows_and_branches_resume_bit_for_bit(method, tmp_path):
    """They do in the middle of a rollout's updates."""
    run = trained(method, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir())
    halves = [n for n in names if (tmp_path / "whole" / "checkpoints" / n / "rows.safetensors").exists()]
    assert len(halves) > 2
    for name in (halves[1], names[-2]):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for other in (tmp_path / name / "checkpoints").iterdir():
            if other.name > name:
                shutil.rmtree(other)
        again = trained(method, tmp_path / name, resume=True)
        weights = [[p.detach() for p in r.process.module.parameters()] for r in (run, again)]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), name
        for file in ("metrics.jsonl", "completions.jsonl"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), name


ROWS = textwrap.dedent(
    """
    import json, sys
    import torch
    from stepwell.planning.branches import Branches, Candidates, Tree
    from stepwell.data.stream import PromptStream
    from stepwell.planning.windows import Backward, Tail, Windows
    from stepwell.process.flow.build import flow
    from stepwell.reward.mixing import Rewards
    from stepwell.rng import Rng
    from stepwell.sampling.request import Prompt
    from stepwell.training.collect import collect
    from stepwell.training.distribute import World

    torch.set_num_threads(1)
    world = World.join()
    process = flow(lambda x, t: x * t, (1,), solver="sde-flow", steps=5, dtype=torch.float64)
    planners = {
        "windows": Windows(3, 2, steps=4, width=2, begin=1),
        "same noise": Windows(3, 3, steps=4, width=4, same_noise=True),
        "tail": Tail(3, 2, steps=4, width=1, same_noise=True, ratio=0.5),
        "branches": Branches(3, 2, at=(0, 2), strides=(1, 2)),
        "tree": Tree(3, 4, steps=4),
        "candidates": Candidates(3, 2, steps=3),
        "backward": Backward(3, 2, steps=4, least=2),
    }
    found = {}
    for name, planner in planners.items():
        prompts = PromptStream([Prompt(number, None) for number in range(5)], Rng(0), shuffle=False)
        rewards = Rewards(lambda completions: [float(x.sum()) for x in completions])
        drawn = collect(process, planner, prompts, rewards, Rng(1), 0, world=world).drawn
        rows, order = drawn.trajectories, {}
        nodes = [[order.setdefault(n, len(order)) if n >= 0 else -1 for n in row] for row in rows.node.tolist()]
        shared = {}
        for row, path in zip(rows.action[:, :, 0].tolist(), nodes):
            for value, node in zip(row, path):
                if node >= 0:
                    assert shared.setdefault(node, value) == value, "one node, one state"
        found[name] = {
            "prompt": rows.prompt.tolist(), "mask": rows.mask.tolist(), "length": rows.length.tolist(),
            "source": rows.source.tolist(), "nodes": nodes, "samples": [float(x) for x in drawn.samples.values],
        }
    json.dump(found, open(f"{sys.argv[1]}/{world.size}-{world.rank}.json", "w"))
    """
)


def test_two_ranks_draw_the_rows_of_one_in_its_order(launch, tmp_path, monkeypatch):
    """Who draws a row decides its noise, and nothing else: prompts, masks, lengths, sources and shared steps agree."""
    launch(ROWS, str(tmp_path))
    first, second = (json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2))
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path)])
    runpy.run_path(str(tmp_path / "script.py"))
    alone = json.loads((tmp_path / "1-0.json").read_text())
    assert first == second, "every rank holds all rows"
    for name, rows in alone.items():
        split = first[name]
        for field in ("prompt", "mask", "length", "source"):
            assert split[field] == rows[field], (name, field)
        assert split["nodes"] == rows["nodes"], name
        assert split["samples"] != rows["samples"], "the second rank has random numbers of its own"
