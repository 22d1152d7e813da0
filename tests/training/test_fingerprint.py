"""A run goes on only with the process that it was started with, whoever wrote that process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from walks import Places

import stepwell as sw
from stepwell.distributions import Categorical
from stepwell.errors import CheckpointError
from stepwell.meter import Meter
from stepwell.objective.policy import Policy
from stepwell.planning.groups import Groups
from stepwell.process.base import Process, Samples, Scores
from stepwell.recipe.recipe import Recipe
from stepwell.training import checkpoint


class Walk(Process):
    """A process of a user's own: to the left or right, in a wind that belongs to its environment."""

    def __init__(self, wind=0.1, bounds=(-3, 3), **more):
        self.module, self.meter = nn.Linear(1, 2).double(), Meter()
        for parameter in self.module.parameters():
            parameter.data.fill_(0.25)
        self.wind, self.bounds, self.drawn = wind, bounds, 0
        vars(self).update(more)

    def start(self, prompts, rng):
        self.drawn += len(prompts)
        return Places(torch.zeros(len(prompts), dtype=torch.float64))

    def propose(self, state):
        return Categorical(self.module(state.place[:, None]))

    def advance(self, state, action, rng):
        return Places((state.place + 2 * action - 1 + self.wind).clamp(*self.bounds), state.step + 1)

    def finish(self, state):
        return Samples(state.place.tolist())

    def score(self, trajectories, needs=(), context=None, reference=None):
        moves = 2 * trajectories.action - 1 + self.wind
        places = torch.cat([torch.zeros(len(moves), 1), moves.cumsum(1)[:, :-1]], 1).clamp(*self.bounds).double()
        log_prob = self.module(places[..., None]).log_softmax(-1)
        log_prob = log_prob.gather(-1, trajectories.action[..., None])[..., 0]
        return Scores(log_prob.masked_fill(~trajectories.mask, 0.0))


class Stroll(Walk):
    """Another class of the same file."""


def right(completions, **columns):
    return [float(place) for place in completions]


def run(process, out, steps, resume=False):
    recipe = Recipe(Policy(), Groups(2, 4), epochs=2)
    settings = {"learning_rate": 0.1, "checkpoint_every": 1, "keep": 1000}
    return sw.train(process, [None, None], right, recipe, out=out, steps=steps, resume=resume, **settings)


def weights(run):
    return [parameter.detach().clone() for parameter in run.process.module.parameters()]


def test_a_process_of_ones_own_resumes_bit_for_bit(tmp_path):
    """Also with attributes that JSON writes differently (a tuple) and that count while rows are drawn."""
    whole = run(Walk(), tmp_path / "whole", 3)
    run(Walk(), tmp_path / "parts", 1)
    again = run(Walk(), tmp_path / "parts", 3, resume=True)
    assert all(map(torch.equal, weights(whole), weights(again)))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: Walk(wind=0.2), r"of another process \(wind was 0.1, now 0.2\); resume with the process it was"),
        (lambda: Walk(bounds=(-3, 4)), r"\(bounds was \[-3, 3\], now \[-3, 4\]\)"),
        (lambda: Walk(wind=0.2, gusts=[1, 2]), r"\(gusts was null, now \[1, 2\]; wind was 0.1, now 0.2\)"),
        (lambda: Walk(name="a" * 99), r"\(name was another\)"),
        (lambda: Stroll(), r'\(class was "Walk", now "Stroll"\)'),
    ],
    ids=["a number", "a tuple", "one more", "a long text", "a class"],
)
def test_another_process_of_ones_own_is_refused_by_name(other, said, tmp_path):
    run(Walk(), tmp_path, 1)
    with pytest.raises(CheckpointError, match=said):
        run(other(), tmp_path, 2, resume=True)


def test_a_changed_file_is_another_process(tmp_path, monkeypatch):
    run(Walk(), tmp_path, 1)
    monkeypatch.setattr("stepwell.process.base.origin", lambda kind: ("Walk", "edited"))
    with pytest.raises(CheckpointError, match=r"of another process \(its code has changed\)"):
        run(Walk(), tmp_path, 2, resume=True)


def test_the_process_that_is_evaluated_is_in_the_fingerprint_too(tmp_path):
    class Slow(Walk):
        """Trained without wind, and evaluated in it."""

        def with_sampler(self, **settings):
            twin = type(self)(self.wind)
            twin.module, twin.meter, twin.wind = self.module, self.meter, 0.0
            return twin

    def go(wind, steps, resume=False):
        recipe = Recipe(Policy(), Groups(2, 4), sampler={"calm": True})
        return sw.train(Slow(wind), [None], right, recipe, out=tmp_path, steps=steps, resume=resume)

    go(0.1, 1)
    with pytest.raises(CheckpointError, match=r"\(wind was 0.1, now 0.3\)"):
        go(0.3, 2, resume=True)
    go(0.1, 2, resume=True)


def test_a_planted_fingerprint_without_the_process_resumes_in_another_wind(tmp_path, monkeypatch):
    """The comparison above can fail: what `describe` does not give nobody misses."""
    monkeypatch.setattr(Walk, "describe", lambda self: {"class": "Walk"})
    run(Walk(), tmp_path, 1)
    assert run(Walk(wind=0.2), tmp_path, 2, resume=True).steps == 2


def test_a_checkpoint_keeps_the_fingerprint_of_the_beginning(tmp_path):
    """A process may count in an attribute; the count of a later moment is not part of what the run is."""
    run(Walk(), tmp_path, 2)
    content, _ = checkpoint.read(checkpoint.newest(tmp_path / "checkpoints"))
    assert content["fingerprint"]["process"]["trained"]["drawn"] == 0
