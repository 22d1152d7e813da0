"""The record of a rollout: whoever draws rows, here or elsewhere, makes trajectories of them through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwell.errors import InputError
from stepwell.process.base import Process, Samples, Steps
from stepwell.sampling.request import Begun, Prompt, Request
from stepwell.trajectories import PROVENANCES, Trajectories, concatenate, make


@dataclass(frozen=True)
class Drawn:
    """Trajectories and, row by row, the samples as the user sees them and the prompts they answer."""

    trajectories: Trajectories
    samples: Samples
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Drawn:
        """The rows at the given places, or where a bool tensor is True."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        rows = index.tolist()
        return Drawn(self.trajectories[index], self.samples[rows], [self.prompts[row] for row in rows])

    def __add__(self, other: Drawn) -> Drawn:
        """Both, with the rows of `other` after these; both belong to one step's rollout."""
        return Drawn(
            concatenate([self.trajectories, other.trajectories]),
            self.samples + other.samples,
            self.prompts + other.prompts,
        )


class Record:
    """The steps of rows while they are drawn. Rows come and go, so every step lists its rows.

    `owner` (N,) is the request that each row answers. Call `add` once for every step, in the order of steps, with the
    rows that take it; `weigh` where rows were drawn from another distribution than the process's; `end` once for every
    row that is judged; and `drawn` at last. Rows that an engine drew whole are put on record by `add_rows`.

    Example:
        >>> from stepwell.process.exact import markov
        >>> process, request = markov(symbols=3, length=2), Request(Prompt(0, 0), 1)
        >>> record = Record([request], torch.tensor([0]))
        >>> record.add_rows([torch.tensor([1, 0])], [torch.tensor([-0.5, -1.0])])
        >>> record.end(torch.tensor([0]), Samples([(1, 0)]))
        >>> record.drawn(process).trajectories.log_prob.tolist()
        [[-0.5, -1.0]]
    """

    def __init__(self, requests: Sequence[Request], owner: Tensor):
        rows = len(owner)
        self.requests, self.owner = list(requests), owner
        self.truncated = torch.zeros(rows, dtype=torch.bool)  # rows that were cut at their horizon
        self._steps: list[tuple[Tensor, int, Tensor, Tensor, Tensor]] = []
        self._log_weight = torch.zeros(rows, dtype=torch.float64)
        self._ended: list[tuple[Tensor, Samples]] = []
        self._begun: Begun | None = None

    def begin(self, begun: Begun) -> None:
        """The steps behind the rows where they start."""
        prefix, everyone = begun.prefix, torch.arange(len(self.owner))
        self._begun = begun
        if prefix is None:
            return
        window = self.requests[0].window if begun.windowed else None
        self._log_weight += prefix.weight.double().cpu()
        for step in range(begun.steps):
            trained = prefix.mask[:, step].cpu() & (window is None or window[0] <= step < window[1])
            self.add(everyone, step, prefix.action[:, step], prefix.log_prob[:, step], trained)

    def add(self, rows: Tensor, step: int, action: Tensor, log_prob: Tensor, random: Tensor) -> None:
        """Step number `step` of `rows` (M,): action (M, ...), its log-probability under the distribution it was drawn
        from (M,), and random (M,) bool: True where it may be trained."""
        self._steps.append((rows, step, action, log_prob, random))

    def add_rows(
        self, action: Sequence[Tensor], log_prob: Sequence[Tensor], random: Sequence[Tensor] | None = None
    ) -> None:
        """All steps of all rows: action (T_i, ...), log_prob (T_i,) and random (T_i,) bool, True unless given."""
        lengths = torch.tensor([len(row) for row in action])
        trained = [torch.ones(len(row), dtype=torch.bool) for row in action] if random is None else random
        actions, log_probs, flags = (
            pad_sequence(list(column), batch_first=True) for column in (action, log_prob, trained)
        )
        for step in range(int(lengths.max())):
            rows = (lengths > step).nonzero()[:, 0]
            self.add(rows, step, actions[rows, step], log_probs[rows, step], flags[rows, step].cpu())

    def weigh(self, rows: Tensor, log_ratio: Tensor) -> None:
        """Add log p - log q (M,) of a step that was drawn from q in place of the process's own p."""
        self._log_weight[rows] += log_ratio.double().cpu()

    def end(self, rows: Tensor, samples: Samples) -> None:
        """The samples of rows (M,) that are at their end; `InputError` where they are not one for each row."""
        lists = {"values": samples.values, "truncated": samples.truncated}
        lists |= {f"columns['{name}']": column for name, column in samples.columns.items()}
        lists |= {f"steps.{name}": column for name, column in vars(samples.steps).items()}
        for name, entries in lists.items():
            if entries is not None and len(entries) != len(rows):
                raise InputError(
                    f"Samples.{name} must have an entry for each of the {len(rows)} rows that ended together, got "
                    f"{len(entries)}."
                )
        self._ended.append((rows, samples))

    def drawn(self, process: Process, *, version: int = 0, first_node: int = 0) -> Drawn:
        """Everything on record. New nodes are numbered from `first_node`.

        Raises `InputError` where a sample's numbers of each step (`Samples.steps`) are not one for each step.
        """
        requests, owner, total = self.requests, self.owner, len(self.owner)
        length = torch.zeros(total, dtype=torch.long)
        for rows, step, *_ in self._steps:
            length[rows] = step + 1
        action, log_prob, mask = self._table(total, int(length.max()))
        node = first_node + torch.arange(mask.numel()).reshape(mask.shape)
        node = node.masked_fill(torch.arange(mask.shape[1]) >= length[:, None], -1)
        if self._begun is not None and self._begun.node is not None:
            node[:, : self._begun.node.shape[1]] = self._begun.node.cpu()
        ended, samples = self._samples()
        truncated = self.truncated.clone()
        if samples.truncated is not None:
            truncated[ended] |= torch.tensor(samples.truncated)
        condition = process.condition([request.prompt.value for request in requests])
        trajectories = make(
            action,
            log_prob,
            mask,
            length=length,
            prompt=torch.tensor([requests[i].prompt.id for i in owner.tolist()]),
            node=node,
            truncated=truncated,
            outcome=torch.tensor([requests[i].judged for i in owner.tolist()]),
            weight=self._log_weight.to(log_prob.dtype),
            source=torch.tensor([requests[i].source for i in owner.tolist()]),
            version=torch.full((total,), version),
            provenance=self._provenance(length),
            condition=None if condition is None else condition[owner],
            **self._by_step(ended, samples.steps, length, log_prob),
        )
        if trajectories.mask.device != action.device:
            trajectories = trajectories.to(action.device)
        values = _spread(samples.values, ended, total)
        columns = {name: _spread(column, ended, total) for name, column in samples.columns.items()}
        return Drawn(trajectories, Samples(values, columns), [requests[i].prompt for i in owner.tolist()])

    def _provenance(self, length: Tensor) -> Tensor:
        """(N,) places in `PROVENANCES`; rows that go on from others have that of those."""
        asked = [0] * len(self.requests)
        for place, request in enumerate(self.requests):
            if request.proposal is not None:
                asked[place] = PROVENANCES.index("proposed")
            elif request.context is not None:
                asked[place] = PROVENANCES.index("hinted")
        own = torch.tensor(asked)[self.owner]
        if self._begun is None or self._begun.prefix is None:
            return own
        before = self._begun.prefix.provenance.cpu()
        if not self._begun.windowed:  # rows of an earlier rollout, which was over for those that had an outcome
            again = self._begun.prefix.outcome.cpu() & (length == self._begun.steps)
            before = before.masked_fill(again & (before == 0), PROVENANCES.index("replayed"))
        return torch.where(before > 0, before, own)

    def _table(self, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """action (N, T, ...), log_prob (N, T), mask (N, T)."""
        if not self._steps:  # every row was done at its start
            return torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0), torch.zeros(rows, 0).bool()
        first, kinds = self._steps[0][2], [(step[2].dtype, step[3].dtype) for step in self._steps]
        action_kind, log_prob_kind = (reduce(torch.promote_types, column) for column in zip(*kinds, strict=True))
        if all(len(row) == rows for row, *_ in self._steps):  # nobody left before the end
            mask = torch.stack([random for *_, random in self._steps], 1)
            log_prob = torch.stack([log_p.to(log_prob_kind) for *_, log_p, _ in self._steps], 1)
            action = torch.stack([drawn.to(action_kind) for _, _, drawn, *_ in self._steps], 1)
            return action, log_prob.masked_fill(~mask.to(log_prob.device), 0.0), mask
        action = torch.zeros(rows, width, *first.shape[1:], dtype=action_kind, device=first.device)
        log_prob = torch.zeros(rows, width, dtype=log_prob_kind, device=first.device)
        mask = torch.zeros(rows, width, dtype=torch.bool)
        for row, step, drawn, log_p, random in self._steps:
            action[row, step], mask[row, step] = drawn.to(action_kind), random
            log_prob[row, step] = log_p.to(log_prob_kind).masked_fill(~random.to(log_p.device), 0.0)
        return action, log_prob, mask

    def _samples(self) -> tuple[Tensor, Samples]:
        """The rows that are at their end, in the order in which they came there, and their samples."""
        if not self._ended:
            return torch.zeros(0, dtype=torch.long), Samples([])
        samples = self._ended[0][1]
        for _, later in self._ended[1:]:
            samples = samples + later
        return torch.cat([rows for rows, _ in self._ended]), samples

    def _by_step(self, ended: Tensor, steps: Steps, length: Tensor, log_prob: Tensor) -> dict[str, Tensor]:
        """`segment`, `step_reward` (N, T), `observed` (N, T, *O) and `last_observed` (N, *O), where there are such."""
        fields = {}
        given = (
            ("segment", "segment", steps.segment, torch.long),
            ("step_reward", "reward", steps.reward, log_prob.dtype),
            ("observed", "observation", steps.observation, None),
        )
        for field, name, rows, kind in given:
            if rows is None:
                continue
            numbers = [torch.as_tensor(row, dtype=kind, device=log_prob.device) for row in rows]
            table = torch.zeros(*log_prob.shape, *numbers[0].shape[1:], dtype=numbers[0].dtype, device=log_prob.device)
            for row, entries in zip(ended.tolist(), numbers, strict=True):
                if len(entries) != length[row]:
                    raise InputError(
                        f"Samples.steps.{name} must have an entry for each of the {int(length[row])} steps of row "
                        f"{row}, got {len(entries)}."
                    )
                table[row, : len(entries)] = entries
            fields[field] = table
        if steps.last is not None:
            rows_last = torch.stack([torch.as_tensor(row, device=log_prob.device) for row in steps.last])
            table = torch.zeros(len(length), *rows_last.shape[1:], dtype=rows_last.dtype, device=log_prob.device)
            fields["last_observed"] = table.index_copy(0, ended.to(log_prob.device), rows_last)
        prefix = None if self._begun is None else self._begun.prefix
        if prefix is not None and self._begun is not None:
            _refuse_other_observations(fields.get("observed"), prefix.observed, ended, self._begun.steps)
            if prefix.segment is not None and bool((length == self._begun.steps).all()):
                fields["segment"] = prefix.segment[:, : log_prob.shape[1]].to(log_prob.device)  # else the process's own
        return fields


def _refuse_other_observations(seen: Tensor | None, before: Tensor | None, rows: Tensor, steps: int) -> None:
    """Raise `InputError` where the observations of rows that were gone through again are not those of the first time.

    Their stored log-probabilities would be those of neither.
    """
    if seen is None or before is None:
        return
    pairs = seen[rows, :steps], before.to(seen.device)[rows, :steps]
    if not bool(torch.isclose(*pairs, equal_nan=True).all()):
        raise InputError(
            f"The observations of a row's first {steps} steps must be the same when these are gone through again, got "
            "others: the environment is random. Continue a Snapshot instead."
        )


def _spread(column: Sequence[Any], rows: Tensor, total: int) -> list[Any]:
    """The entries at their rows (M,) of a list of `total`; None elsewhere."""
    spread: list[Any] = [None] * total
    for row, entry in zip(rows.tolist(), column, strict=True):
        spread[row] = entry
    return spread
