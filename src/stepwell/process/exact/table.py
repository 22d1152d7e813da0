"""Processes small enough to enumerate: the yardstick that everything else is held against."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from stepwell.columns import Columns
from stepwell.distributions import Categorical, Point
from stepwell.errors import InputError, MissingAbility
from stepwell.meter import Meter
from stepwell.process.base import Process, Samples, Scores, check_needs
from stepwell.process.language.segments import segments
from stepwell.ranges import Count, Demand, Positive, Range, Size, checked
from stepwell.rng import Rng
from stepwell.trajectories import Trajectories, make

END = 0
"""The symbol that ends a string, where strings may end early."""

STOP = 1
"""The symbol that ends a segment: what a full stop is to a sentence."""


@dataclass(frozen=True)
class StringState:
    """Partial strings: `text` (N, length) filled up to `position`, one prompt a row."""

    prompt: Tensor
    text: Tensor
    position: int
    done: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, index: Tensor) -> StringState:
        return StringState(self.prompt[index], self.text[index], self.position, self.done[index])


class StringTable(nn.Module):
    """Logits of the next symbol, and the value, by prompt and context."""

    def __init__(self, logits: Tensor, value: Tensor):
        super().__init__()
        self.logits = logits if isinstance(logits, nn.Parameter) else nn.Parameter(logits)
        self.value = nn.Parameter(value)


class TabularLanguage(Process):
    """A language model that is a table: every string, probability and gradient can be written down.

    Strings have at most `length` symbols out of 0..symbols-1. With `end`, symbol 0 ends a string early; without,
    all strings have the full length. The distribution of a symbol depends on the prompt (an integer below `prompts`)
    and on the last `order` symbols, or on all of them where `order` is None. All numbers are float64.

    Example:
        >>> model = markov(symbols=3, length=2)
        >>> round(model.string_probabilities().sum().item(), 12)
        1.0
    """

    kind = "language"
    any_prompt = False
    offers = frozenset({"entropy", "value", "final_value", "sum_of_squares", "kl", "logits", "hidden"})

    def __init__(
        self, logits: Tensor, length: int, order: int | None = 1, end: bool = True, value: Tensor | None = None
    ):
        self.prompts, self.contexts, self.symbols = logits.shape
        self.length, self.order, self.end = length, length if order is None else min(order, length), end
        expected = (self.symbols + 1) ** self.order
        if self.contexts != expected:
            raise ValueError(f"logits must have {expected} contexts for order {self.order}, got {self.contexts}.")
        value = torch.zeros(logits.shape[:2], dtype=torch.float64) if value is None else value
        self.module: nn.Module = StringTable(logits.double(), value.double())
        self.module.get_parameter("value").requires_grad_(False)
        self.meter = Meter()

    @property
    def logits(self) -> Tensor:
        """(prompts, contexts, symbols), the parameters."""
        return self.module.get_parameter("logits")

    # the contract

    def check_prompt(self, value: Any) -> None:
        """Raise `InputError` for a prompt that is not the number of one of the tables."""
        last = len(self.logits) - 1
        Demand(range=Range(f"a whole number from 0 to {last}", 0, last, whole=True)).refuse("A prompt", value)

    def start(self, prompts: Sequence[int], rng: Rng) -> StringState:
        count = len(prompts)
        text = torch.zeros(count, self.length, dtype=torch.long)
        done = torch.full((count,), self.length == 0)
        return StringState(torch.tensor(prompts, dtype=torch.long), text, 0, done)

    def propose(self, state: StringState) -> Categorical:
        self.meter.add(model_evaluations=len(state), forward=len(state))
        place = torch.where(state.done, self.length, state.position)  # of done rows: after all of their text
        context = self._contexts(pad(state.text, (0, 1))).gather(1, place[:, None])[:, 0]
        return Categorical(self.logits[state.prompt, context])

    def deterministic(self, state: StringState) -> Point:
        """The likeliest symbol of each row."""
        return Point(self.propose(state).logits.argmax(-1))

    def advance(self, state: StringState, action: Tensor, rng: Rng) -> StringState:
        if bool(state.done.all()):
            return state
        text, live = state.text.clone(), ~state.done
        text[live, state.position] = action[live]
        over = (action == END) if self.end else torch.zeros_like(state.done)
        position = state.position + 1
        return replace(state, text=text, position=position, done=state.done | over | (position >= self.length))

    def finish(self, state: StringState) -> Samples:
        """The strings as tuples of symbols, up to and with the end symbol."""
        values = [self._cut(tuple(row[: state.position])) for row in state.text.tolist()]
        return Samples(values, {"completion_ids": [list(value) for value in values]})

    def condition(self, prompts: Sequence[int]) -> Columns:
        return Columns({"prompt": torch.tensor(prompts, dtype=torch.long)}, len(prompts))

    def check_teacher(self, teacher: Process) -> None:
        """Raise `InputError` for a teacher with another number of symbols."""
        super().check_teacher(teacher)
        if not isinstance(teacher, TabularLanguage) or teacher.symbols != self.symbols:
            raise InputError(f"teacher must be a table of {self.symbols} symbols, as the model is.")

    def score(
        self,
        trajectories: Trajectories,
        needs: Collection[str] = (),
        context: Columns | None = None,
        reference: Process | None = None,
    ) -> Scores:
        check_needs(self, needs, reference)
        condition = trajectories.condition if context is None else context
        if condition is None:
            raise MissingAbility(
                "A tabular model scores rows by their prompt, but these trajectories have no condition."
            )
        rows, mask = condition["prompt"][:, None], trajectories.mask
        amount = int(mask.sum())
        self.meter.add(model_evaluations=len(mask), forward=amount)
        if torch.is_grad_enabled():
            self.meter.add(backward=amount)
        contexts = self._contexts(trajectories.action)
        logits = self.logits[rows, contexts].log_softmax(-1)
        log_prob = logits.gather(-1, trajectories.action[..., None])[..., 0].masked_fill(~mask, 0.0)
        steps = Categorical(logits.flatten(0, 1))  # all steps of all rows, one after another
        extra: dict[str, Tensor] = {}
        for need in needs:
            if need == "entropy":
                extra[need] = steps.entropy().reshape(mask.shape) * mask
            elif need == "value":
                extra[need] = self.module.get_parameter("value")[rows, contexts] * mask
            elif need == "final_value":
                extra[need] = self._final_value(trajectories, condition["prompt"])
            elif need == "sum_of_squares":
                extra[need] = logits.exp().pow(2).sum(-1) * mask
            elif need == "logits":
                extra[need] = logits
            elif need == "hidden":  # a one-hot context, on which the table is a linear output layer
                extra[need] = one_hot(rows * self.contexts + contexts, self.prompts * self.contexts).to(logits.dtype)
            else:
                assert reference is not None
                with torch.no_grad():
                    other = reference.score(trajectories, {"logits"}, context)["logits"]
                extra[need] = steps.kl(Categorical(other.flatten(0, 1))).reshape(mask.shape).masked_fill(~mask, 0.0)
        return Scores(log_prob, extra)

    def _final_value(self, rows: Trajectories, prompt: Tensor) -> Tensor:
        """(N,) the value of the context that each row's last symbol leads to."""
        after = torch.cat([rows.action, rows.action.new_zeros(len(rows), 1)], 1)
        context = self._contexts(after).gather(1, rows.length[:, None])[:, 0]
        return self.module.get_parameter("value")[prompt, context]

    def segments(self, trajectories: Trajectories) -> Tensor:
        """(N, T) the number of each step's segment; a segment ends with the symbol `STOP`."""
        return segments(trajectories.action, torch.tensor([STOP]))

    def encode_completion(self, completion: Sequence[int], prompt: Any = None) -> Tensor:
        """(T,) the symbols of a string written elsewhere."""
        symbols = [int(symbol) for symbol in completion]
        if not symbols or len(symbols) > self.length or not all(0 <= symbol < self.symbols for symbol in symbols):
            raise InputError(
                f"A completion must be 1 to {self.length} symbols from 0 to {self.symbols - 1}, got {symbols}."
            )
        return torch.tensor(symbols)

    @property
    def horizon(self) -> int:
        """The largest number of steps of a row."""
        return self.length

    def with_value_head(self) -> Self:
        """A twin on the same logits whose table of values, a copy of this one's, learns."""
        twin = copy.copy(self)
        twin.module = StringTable(self.logits, self.module.get_parameter("value").detach().clone())
        return twin

    # what can be enumerated

    def strings(self) -> list[tuple[int, ...]]:
        """Every complete string, in the order of `trajectories`."""
        texts = itertools.product(range(self.symbols), repeat=self.length)
        return sorted({self._cut(text) for text in texts}, key=lambda text: (len(text), text))

    def trajectories(self, prompt: int = 0) -> Trajectories:
        """Every complete string as a row, with its log-probabilities now."""
        strings = self.strings()
        action = torch.zeros(len(strings), self.length, dtype=torch.long)
        mask = torch.zeros(len(strings), self.length, dtype=torch.bool)
        for row, text in enumerate(strings):
            action[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), True
        rows = make(action, torch.zeros(mask.shape, dtype=torch.float64), mask)
        rows = rows.replace(
            prompt=torch.full((len(strings),), prompt), condition=self.condition([prompt] * len(strings))
        )
        with torch.no_grad():
            return rows.replace(log_prob=self.score(rows).log_prob)

    def string_log_probabilities(self, prompt: int = 0) -> Tensor:
        """(strings,) log-probability of every complete string, differentiable."""
        return self.score(self.trajectories(prompt)).log_prob.sum(1)

    def string_probabilities(self, prompt: int = 0) -> Tensor:
        """(strings,) probability of every complete string, differentiable; they sum to 1."""
        return self.string_log_probabilities(prompt).exp()

    def expectation(self, function: Callable[[tuple[int, ...]], float], prompt: int = 0) -> Tensor:
        """The exact expectation of a function of the string, differentiable: its gradient is the policy gradient."""
        values = torch.tensor([float(function(text)) for text in self.strings()], dtype=torch.float64)
        return (self.string_probabilities(prompt) * values).sum()

    def log_partition(self, log_potential: Callable[[tuple[int, ...]], float], prompt: int = 0) -> Tensor:
        """log of the sum over strings of p(y) exp(log_potential(y)): the evidence of the tilted model."""
        potential = torch.tensor([float(log_potential(text)) for text in self.strings()], dtype=torch.float64)
        return torch.logsumexp(self.string_log_probabilities(prompt) + potential, 0)

    def tilted(self, log_potential: Callable[[tuple[int, ...]], float]) -> TabularLanguage:
        """The model under which a string has probability p(y) exp(log_potential(y)) / Z, exactly, for every prompt."""
        logits = torch.full(
            (self.prompts, (self.symbols + 1) ** self.length, self.symbols), -torch.inf, dtype=torch.float64
        )
        twin = TabularLanguage(torch.zeros_like(logits), self.length, None, self.end)
        potential = torch.tensor([float(log_potential(text)) for text in self.strings()], dtype=torch.float64)
        rows = self.trajectories()
        contexts = twin._contexts(rows.action)
        for prompt in range(self.prompts):
            mass = torch.zeros(logits.shape[1:], dtype=torch.float64)
            weight = (self.string_log_probabilities(prompt).detach() + potential).softmax(0)
            for step in range(self.length):
                live = rows.mask[:, step]
                mass.index_put_((contexts[live, step], rows.action[live, step]), weight[live], accumulate=True)
            reached = mass.sum(-1) > 0
            logits[prompt, reached] = mass[reached].log()
            logits[prompt, ~reached] = 0.0
        twin.logits.data.copy_(logits)
        return twin

    def _contexts(self, text: Tensor) -> Tensor:
        """(N, T) index of the context before each symbol of `text` (N, T): its last `order` symbols."""
        count, steps = text.shape
        start = torch.full((count, self.order), self.symbols)  # one symbol beyond the alphabet: before the string
        padded = torch.cat([start, text], 1)
        code = torch.zeros(count, steps, dtype=torch.long)
        for back in range(self.order):
            code = code * (self.symbols + 1) + padded[:, back : back + steps]
        return code

    def _cut(self, text: tuple[int, ...]) -> tuple[int, ...]:
        return text[: text.index(END) + 1] if self.end and END in text else text


@checked()
def markov(
    symbols: Size = 3,
    length: Size = 4,
    *,
    order: Count | None = 1,
    prompts: Size = 1,
    end: bool = True,
    seed: int = 0,
    temperature: Positive = 1.0,
) -> TabularLanguage:
    """A random tabular language model: logits are normals over `temperature`, drawn from `Rng(seed)`."""
    contexts = (symbols + 1) ** (length if order is None else min(order, length))
    logits = Rng(seed).normal(prompts, contexts, symbols, dtype=torch.float64) / temperature
    return TabularLanguage(logits, length, order, end)


def conditioned(rows: Trajectories, prompts: Sequence[Any]) -> Trajectories:
    """The same rows under other prompts of a tabular model."""
    condition = Columns({"prompt": torch.tensor(prompts, dtype=torch.long)}, len(rows))
    return rows.replace(condition=condition)
