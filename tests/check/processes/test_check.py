"""The laws of a process can fail: each planted mistake breaks the law it should, and honest processes pass."""

from dataclasses import dataclass, replace

import pytest
import torch
from mistakes import GoesOnWriting

from stepwell import check
from stepwell.columns import Columns
from stepwell.distributions import Categorical
from stepwell.errors import InputError, LawBroken
from stepwell.meter import Meter
from stepwell.process.base import Samples, Scores
from stepwell.process.exact.table import StringState, TabularLanguage, markov
from stepwell.rng import Rng

LOGITS = Rng(0).normal(2, 4, 3, dtype=torch.float64)


def inspect(kind, prompts=(0, 1), **settings):
    return check.process(kind(LOGITS.clone(), 3), prompts, **settings)


def test_an_honest_process_passes_and_the_report_says_how_well():
    report = inspect(TabularLanguage, evaluations_per_step=1)
    assert report.tolerance == 1e-10
    assert not report.skipped
    assert max(report.measured.values()) < 1e-12
    assert "ratio: " in str(report)


def test_checking_a_process_restores_its_parameters():
    model = markov(prompts=2)
    before = model.logits.detach().clone()
    check.process(model, [0, 1])
    assert torch.equal(model.logits, before)


def test_a_check_needs_a_prompt():
    with pytest.raises(InputError, match="at least one prompt"):
        inspect(TabularLanguage, prompts=())


# planted mistakes


class StoresAnotherTemperature(TabularLanguage):
    def propose(self, state):
        return Categorical(super().propose(state).logits / 1.01)


class ForgetsThePromptInScores(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        first = Columns({"prompt": torch.zeros(len(trajectories), dtype=torch.long)})
        return super().score(trajectories, needs, first)


class SortedState(StringState):
    """A state whose forks come in the order of the original rows, whatever order was asked for."""

    def __getitem__(self, index):
        index = index.sort().values
        return SortedState(self.prompt[index], self.text[index], self.position, self.done[index])


class ForksIgnoreTheOrder(TabularLanguage):
    def start(self, prompts, rng):
        state = super().start(prompts, rng)
        return SortedState(state.prompt, state.text, state.position, state.done)


@dataclass(frozen=True)
class Cached:
    """A state with a cache that its forks share, as a key-value cache may."""

    inner: StringState
    cache: list

    @property
    def done(self):
        return self.inner.done

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return Cached(self.inner[index], self.cache)


class ForksShareACache(TabularLanguage):
    def start(self, prompts, rng):
        return Cached(super().start(prompts, rng), [])

    def propose(self, state):
        distribution = super().propose(state.inner)
        return Categorical(distribution.logits * (1 + 0.1 * max(len(state.cache) - state.inner.position, 0)))

    def advance(self, state, action, rng):
        state.cache.append(action)
        return Cached(super().advance(state.inner, action, rng), state.cache)

    def finish(self, state):
        return super().finish(state.inner)


class AdvancesInPlace(TabularLanguage):
    def advance(self, state, action, rng):
        text = state.text
        answer = super().advance(state, action, rng)
        text[:, max(state.position - 1, 0)] = action  # overwrites what the context of `state` reads
        return answer


class ComesBackToLife(TabularLanguage):
    """A row is done only as long as its last symbol says so."""

    def advance(self, state, action, rng):
        following = super().advance(state, action, rng)
        return replace(following, done=(action == 0) | (following.position >= self.length))


class ShowsWhatItWasDoneWith(TabularLanguage):
    """Samples of rows that are done tell how long others went on."""

    def finish(self, state):
        samples = super().finish(state)
        return replace(samples, columns={"steps": [state.position] * len(state)})


class DoneRowsCount(TabularLanguage):
    """Rows that are done take part in a mean over the batch."""

    def propose(self, state):
        distribution = super().propose(state)
        return Categorical(distribution.logits * (1 + 0.1 * float(state.done.any())))


class DoneRowsEndOthers(TabularLanguage):
    """The batch ends with its first row."""

    def advance(self, state, action, rng):
        following = super().advance(state, action, rng)
        return replace(following, done=following.done | state.done.any())


class DependsOnTheBatch(TabularLanguage):
    def propose(self, state):
        distribution = super().propose(state)
        return Categorical(distribution.logits + 0.01 * distribution.logits.mean(0) * (len(state) > 1))


class ScoresDependOnTheBatch(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        scores = super().score(trajectories, needs, context)
        return Scores(scores.log_prob * (1.0 if len(trajectories) > 4 else 1.001), scores.extra)


class ScoresPadding(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        everything = trajectories.replace(mask=torch.ones_like(trajectories.mask))
        return super().score(everything, needs, context)


class CountsStepsFromTheRight(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        scores = super().score(trajectories, needs, context)
        steps = trajectories.mask.shape[1]
        return Scores(scores.log_prob * (1 + 0.01 * max(steps - self.length, 0)), scores.extra)


class DrawsFromTheGlobalGenerator(TabularLanguage):
    def propose(self, state):
        distribution = super().propose(state)
        return Categorical(distribution.logits + torch.rand_like(distribution.logits))


class CountsTwice(TabularLanguage):
    def propose(self, state):
        self.meter.add(model_evaluations=len(state))
        return super().propose(state)


class CountsFractions(TabularLanguage):
    def propose(self, state):
        self.meter.add(forward=0.5)
        return super().propose(state)


class CountsBackwardWhileDrawing(TabularLanguage):
    def propose(self, state):
        self.meter.add(backward=len(state))
        return super().propose(state)


class CountsNothing(TabularLanguage):
    def propose(self, state):
        distribution = super().propose(state)
        self.meter.add(forward=-len(state))
        return distribution


class CountsOnlyTheFirstRollouts(TabularLanguage):
    rollouts = 0

    def start(self, prompts, rng):
        self.rollouts += 1
        self.meter.add(forward=100 // self.rollouts)
        return super().start(prompts, rng)


class CountsForks(TabularLanguage):
    def condition(self, prompts):
        self.meter.add(model_evaluations=1)
        return super().condition(prompts)


class CountsPadding(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        self.meter.add(forward=trajectories.mask.numel())
        return super().score(trajectories, needs, context)


class CountsBackwardWithoutGradient(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        self.meter.add(backward=1)
        return super().score(trajectories, needs, context)


class CountsNothingBackward(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        with torch.no_grad():
            scores = super().score(trajectories, needs, context)
        rows, contexts = trajectories.condition["prompt"][:, None], self._contexts(trajectories.action)
        log_probs = self.logits[rows, contexts].log_softmax(-1)
        log_prob = log_probs.gather(-1, trajectories.action[..., None])[..., 0].masked_fill(~trajectories.mask, 0)
        return Scores(scores.log_prob + log_prob - log_prob.detach())


class IsNotDifferentiable(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        return super().score(trajectories, needs, context).detach()


class ForgetsTheNormaliserInTheGradient(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        value = super().score(trajectories, needs, context).log_prob
        rows, contexts = trajectories.condition["prompt"][:, None], self._contexts(trajectories.action)
        raw = self.logits[rows, contexts].gather(-1, trajectories.action[..., None])[..., 0] * trajectories.mask
        return Scores(value.detach() + raw - raw.detach())


class FrozenSharesItsParameters(TabularLanguage):
    def frozen(self):
        twin = FrozenScores(self.logits.data, self.length)
        twin.meter = self.meter
        twin.module.logits.data = self.logits.data
        return twin


class FrozenScores(TabularLanguage):
    def score(self, trajectories, needs=(), context=None):
        return super().score(trajectories, needs, context).detach()


class FrozenCanLearn(TabularLanguage):
    def frozen(self):
        twin = super().frozen()
        twin.module.requires_grad_(True)
        return twin


class FrozenHasAnotherMeter(TabularLanguage):
    def frozen(self):
        twin = super().frozen()
        twin.meter = Meter()
        return twin


class FrozenIsTheBeginning(TabularLanguage):
    def frozen(self):
        twin = super().frozen()
        twin.module.logits.data += torch.eye(4, 3)
        return twin


class ShowsOtherStrings(TabularLanguage):
    def finish(self, state):
        samples = super().finish(state)
        return Samples([text[:-1] + (0,) for text in samples.values], samples.columns)


class DrawsFromAnother(Categorical):
    """States one distribution and draws from another."""

    def sample(self, rng):
        return rng.categorical(self.probabilities.sqrt())


class DrawsWhatItDoesNotSay(TabularLanguage):
    def propose(self, state):
        return DrawsFromAnother(super().propose(state).logits)


MISTAKES = [
    (StoresAnotherTemperature, "ratio"),
    (ForgetsThePromptInScores, "ratio"),
    (ForksIgnoreTheOrder, "fork"),
    (ForksShareACache, "fork"),
    (AdvancesInPlace, "fork"),
    (GoesOnWriting, "absorbing"),
    (ComesBackToLife, "absorbing"),
    (ShowsWhatItWasDoneWith, "absorbing"),
    (DoneRowsCount, "absorbing"),
    (DoneRowsEndOthers, "absorbing"),
    (DependsOnTheBatch, "rows"),
    (ScoresDependOnTheBatch, "rows"),
    (ScoresPadding, "padding"),
    (CountsStepsFromTheRight, "padding"),
    (DrawsFromTheGlobalGenerator, "seed"),
    (CountsTwice, "meter"),
    (CountsFractions, "meter"),
    (CountsBackwardWhileDrawing, "meter"),
    (CountsNothing, "meter"),
    (CountsOnlyTheFirstRollouts, "meter"),
    (CountsForks, "meter"),
    (CountsPadding, "meter"),
    (CountsBackwardWithoutGradient, "meter"),
    (CountsNothingBackward, "meter"),
    (IsNotDifferentiable, "gradient"),
    (ForgetsTheNormaliserInTheGradient, "gradient"),
    (FrozenSharesItsParameters, "frozen"),
    (FrozenCanLearn, "frozen"),
    (FrozenHasAnotherMeter, "frozen"),
    (FrozenIsTheBeginning, "frozen"),
    (ShowsOtherStrings, "exact law"),
    (DrawsWhatItDoesNotSay, "exact law"),
]


@pytest.mark.parametrize(("mistake", "law"), MISTAKES, ids=[kind.__name__ for kind, _ in MISTAKES])
def test_a_mistake_breaks_its_law(mistake, law):
    with pytest.raises(LawBroken, match=f"^The law '{law}' is broken: .*[.]$"):
        inspect(mistake, evaluations_per_step=1)
