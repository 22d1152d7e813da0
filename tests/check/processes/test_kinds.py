"""The laws of a process on processes of many kinds: ragged prompts, environments, continuous steps, no parameters."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from walks import Places

from stepwell import check
from stepwell.check.tolerance import rounding
from stepwell.columns import Columns
from stepwell.distributions import Gaussian, Point
from stepwell.errors import CannotFork, LawBroken
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores
from stepwell.process.exact.table import StringState, TabularLanguage, markov
from stepwell.rng import Rng

LOGITS = Rng(0).normal(2, 4, 3, dtype=torch.float64)


def inspect(kind, prompts=(0, 1)):
    return check.process(kind(LOGITS.clone(), 3), prompts)


# prompts of different lengths


class PromptedLanguage(TabularLanguage):
    """A tabular model whose prompts are texts: their length, told by a mask, chooses the table."""

    def start(self, prompts, rng):
        return super().start([len(text) - 1 for text in prompts], rng)

    def condition(self, prompts):
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in prompts])
        return Columns({"mask": mask})

    def score(self, trajectories, needs=(), context=None):
        condition = trajectories.condition if context is None else context
        table = Columns({"prompt": self.length_of(condition["mask"]) - 1})
        return super().score(trajectories, needs, table)

    def length_of(self, mask):
        return mask.sum(1)

    def string_probabilities(self, prompt=0):
        rows = self.trajectories(len(prompt) - 1).replace(condition=None)
        context = self.condition([prompt] * len(rows))
        return self.score(rows, context=context).log_prob.sum(1).exp()

    def trajectories(self, prompt=0):
        table = TabularLanguage(self.logits.detach(), self.length)
        return table.trajectories(prompt)


class CountsThePaddingOfThePrompt(PromptedLanguage):
    def length_of(self, mask):
        return torch.full((len(mask),), mask.shape[1])


class ReadsTheFirstColumn(PromptedLanguage):
    """Right for a mixed batch, wrong beside a longer prompt still."""

    def length_of(self, mask):
        return 1 + mask[:, 0]


def test_prompts_of_different_lengths_are_padded_without_consequence():
    assert not inspect(PromptedLanguage, prompts=("a", "bc")).skipped


@pytest.mark.parametrize("mistake", [CountsThePaddingOfThePrompt, ReadsTheFirstColumn])
def test_a_prompt_that_scores_by_its_padding_breaks_a_law(mistake):
    with pytest.raises(LawBroken, match=r"'(ratio|rows|padding)'"):
        inspect(mistake, prompts=("a", "bc"))


# what cannot be checked is said


class Unforkable(StringState):
    def __getitem__(self, index):
        if len(index.unique()) < len(index):
            raise CannotFork("This environment cannot be copied.")
        return Unforkable(self.prompt[index], self.text[index], self.position, self.done[index])


class CannotBeCopied(TabularLanguage):
    def start(self, prompts, rng):
        state = super().start(prompts, rng)
        return Unforkable(state.prompt, state.text, state.position, state.done)


class RandomEnvironment(TabularLanguage):
    """An environment that ends an episode whenever it likes."""

    def advance(self, state, action, rng):
        answer = super().advance(state, action, rng)
        return replace(answer, done=answer.done | rng.bernoulli(torch.full((len(state),), 0.3)))


class WithoutParameters(TabularLanguage):
    def __init__(self, logits, length):
        super().__init__(logits, length)
        self.module.requires_grad_(False)


def test_what_a_process_does_not_allow_to_check_is_skipped_with_the_reason():
    assert "cannot fork" in inspect(CannotBeCopied).skipped["fork"]
    assert "more than its actions" in inspect(RandomEnvironment).skipped["exact law"]
    assert "no parameter" in inspect(WithoutParameters).skipped["gradient"]
    assert "outcomes" in check.process(markov(symbols=40, length=3), [0]).skipped["exact law"]


@pytest.mark.parametrize(
    "architecture", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "bloom"))]
)
def test_a_transformer_with_its_cache_obeys_every_law(small_language, architecture):
    report = check.process(small_language(architecture), ["a b c", "d", "e f"], horizon=5)
    assert set(report.skipped) == {"exact law"}


# continuous and single-precision processes


class LearnedWalk(Process):
    """A Gaussian walk with a learned drift from the prompt's place, in single precision; its second step is a point."""

    noise = 0.5

    def __init__(self):
        torch.manual_seed(0)
        self.module, self.meter = nn.Linear(2, 2), Meter()

    def start(self, prompts, rng):
        return Places(torch.tensor(prompts), 0)

    def step_from(self, place, step):
        self.meter.add(model_evaluations=len(place), forward=len(place))
        mean = place + self.module(place)
        return Point(mean) if step == 1 else Gaussian(mean, torch.tensor(self.noise))

    def propose(self, state):
        return self.step_from(state.place, state.step)

    def advance(self, state, action, rng):
        return state if state.step >= 3 else Places(action, state.step + 1)

    def finish(self, state):
        return Samples(list(state.place))

    def condition(self, prompts):
        return Columns({"place": torch.tensor(prompts)})

    def score(self, trajectories, needs=(), context=None, reference=None):
        place = (trajectories.condition if context is None else context)["place"]
        columns = []
        for step in range(trajectories.mask.shape[1]):
            action = trajectories.action[:, step]
            happened = int((trajectories.length > step).sum())
            columns.append(torch.where(trajectories.mask[:, step], self.step_from(place, step).log_prob(action), 0.0))
            self.meter.add(forward=happened - len(place), model_evaluations=happened - len(place))
            if torch.is_grad_enabled():
                self.meter.add(backward=happened)
            place = action
        return Scores(torch.stack(columns, 1))

    def frozen(self):
        twin = LearnedWalk()
        twin.module.load_state_dict(self.module.state_dict())
        twin.module.requires_grad_(False)
        twin.meter, twin.noise = self.meter, self.noise
        return twin


class MeanOfTheDensity(LearnedWalk):
    """The mistake of the flow repositories, on one side only: the mean over dimensions instead of the sum."""

    def score(self, trajectories, needs=(), context=None, reference=None):
        return Scores(super().score(trajectories, needs, context).log_prob / 2)


def test_a_continuous_process_in_single_precision_passes():
    """With the tolerance of its type and its sums."""
    report = check.process(LearnedWalk(), [[0.0, 1.0], [2.0, -1.0]], evaluations_per_step=1)
    assert report.tolerance == rounding(torch.float32, 102)  # two inputs of each output, and what needs no weight
    assert max(report.measured.values()) < report.tolerance
    assert "absorbing" in report.measured
    assert "normal" in report.skipped["exact law"]


def test_the_mean_over_dimensions_is_not_a_log_density():
    with pytest.raises(LawBroken, match="'ratio'"):
        check.process(MeanOfTheDensity(), [[0.0, 1.0], [2.0, -1.0]])
