"""Summaries of the rows of a step for the log and the progress view: metrics, and a few completions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepwell.figures.pictures import described, is_image
from stepwell.objective.term import Objective
from stepwell.parts import compares
from stepwell.sampling.record import Drawn
from stepwell.trajectories import PROVENANCES, Trajectories

TIED_STEPS = 3
"""Steps in a row without any difference in reward after which a run says that it cannot learn from these."""


def row_metrics(rows: Trajectories, names: Sequence[str]) -> dict[str, float]:
    """Rewards and lengths before any update; each reward function by name, over the rows it applies to.

    They count the rows that the policy drew itself; rows of another provenance have numbers of their own, such as
    `demonstrations/reward`. Of tokens a length counts those that were drawn, and not an environment's words; of a
    flow, whose sampler may determine some of its steps, all.
    `tied_groups` is the share of the groups of at least two rows, of any provenance, whose rewards are all equal.
    """
    metrics: dict[str, float] = {}
    for number in rows.provenance.unique().tolist():
        prefix = f"{PROVENANCES[number]}/" if number else ""
        chosen = _metrics(rows, rows.provenance == number, names)
        metrics |= {f"{prefix}{name}": value for name, value in chosen.items()}
    return metrics | _tied(rows)


def _metrics(rows: Trajectories, chosen: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The numbers of the chosen rows (N,) bool."""
    metrics: dict[str, float] = {}
    if rows.reward is not None:
        reward = rows.reward[chosen].double()
        metrics = {"reward": float(reward.mean()), "reward_deviation": float(reward.std(correction=0))}
    if len(names) > 1:
        assert rows.rewards is not None
        each = rows.rewards[chosen].double().nanmean(0).tolist()
        metrics |= {f"reward/{name}": value for name, value in zip(names, each, strict=True)}
    length = (rows.length if rows.action.is_floating_point() else rows.mask.sum(1))[chosen].double()
    return metrics | {"length": float(length.mean()), "truncated": float(rows.truncated[chosen].double().mean())}


def _tied(rows: Trajectories) -> dict[str, float]:
    """The share of tied groups; nothing where no group has two rows, or rows have no reward."""
    if rows.reward is None:
        return {}
    _, group, size = rows.prompt[rows.outcome].unique(return_inverse=True, return_counts=True)
    reward = rows.reward[rows.outcome]
    least, most = (
        torch.zeros_like(size, dtype=reward.dtype).scatter_reduce(0, group, reward, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    several = size > 1
    return {"tied_groups": float((least == most)[several].double().mean())} if bool(several.any()) else {}


def warn_of_ties(objective: Objective, history: Sequence[Mapping[str, Any]]) -> None:
    """Warn once in a run, after `TIED_STEPS` steps without a difference, where a method compares rows of a group."""
    tied = [metrics.get("tied_groups") == 1.0 for metrics in history]
    if not all(tied[-TIED_STEPS:]) or len(tied) < TIED_STEPS or not compares(objective.terms):
        return
    if any(all(tied[end - TIED_STEPS : end]) for end in range(TIED_STEPS, len(tied))):
        return
    warnings.warn(
        f"For {TIED_STEPS} steps all samples of every prompt had the same reward, and this method learns from their "
        "differences: give a reward that tells them apart, more samples a prompt (group_size), or other prompts.",
        stacklevel=2,
    )


def completions(drawn: Drawn, names: Sequence[str], step: int, wanted: int) -> list[dict[str, Any]]:
    """A few rows, spread over the rollout, with their prompts and rewards; of an image, also the `picture` itself."""
    wanted = min(wanted, len(drawn))
    return [_completion(drawn, names, step, place * len(drawn) // wanted) for place in range(wanted)]


def _completion(drawn: Drawn, names: Sequence[str], step: int, row: int) -> dict[str, Any]:
    """The entry of one row."""
    rows, value = drawn.trajectories, drawn.samples.values[row]
    shown = {"step": step, "prompt": _brief(drawn.prompts[row].value), "completion": _brief(value)}
    if rows.reward is not None:
        shown["reward"] = float(rows.reward[row])
    if int(rows.provenance[row]):
        shown["origin"] = PROVENANCES[int(rows.provenance[row])]
    if len(names) > 1:
        assert rows.rewards is not None
        shown["rewards"] = dict(zip(names, rows.rewards[row].tolist(), strict=True))
    return shown | ({"picture": value} if is_image(value) else {})


def _brief(value: Any) -> Any:
    """The value as a line of the log has it: a tensor in few words."""
    return described(value) if isinstance(value, Tensor) else value
