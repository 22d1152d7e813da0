"""Summaries of the rows of a step for the log and the progress view: metrics, and a few completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepwell.figures.pictures import described, is_image
from stepwell.sampling.record import Drawn
from stepwell.trajectories import Trajectories


def row_metrics(rows: Trajectories, names: Sequence[str]) -> dict[str, float]:
    """Rewards and lengths before any update; each reward function by name, over the rows it applies to."""
    assert rows.reward is not None
    reward, length = rows.reward.double(), rows.length.double()
    metrics = {"reward": float(reward.mean()), "reward_deviation": float(reward.std(correction=0))}
    if len(names) > 1:
        assert rows.rewards is not None
        each = rows.rewards.double().nanmean(0).tolist()
        metrics |= {f"reward/{name}": value for name, value in zip(names, each, strict=True)}
    return metrics | {"length": float(length.mean()), "truncated": float(rows.truncated.double().mean())}


def completions(drawn: Drawn, names: Sequence[str], step: int, wanted: int) -> list[dict[str, Any]]:
    """A few rows, spread over the rollout, with their prompts and rewards; of an image, also the `picture` itself."""
    wanted = min(wanted, len(drawn))
    return [_completion(drawn, names, step, place * len(drawn) // wanted) for place in range(wanted)]


def _completion(drawn: Drawn, names: Sequence[str], step: int, row: int) -> dict[str, Any]:
    """The entry of one row."""
    rows, value = drawn.trajectories, drawn.samples.values[row]
    shown = {"step": step, "prompt": _brief(drawn.prompts[row].value), "completion": _brief(value)}
    assert rows.reward is not None
    shown["reward"] = float(rows.reward[row])
    if len(names) > 1:
        assert rows.rewards is not None
        shown["rewards"] = dict(zip(names, rows.rewards[row].tolist(), strict=True))
    return shown | ({"picture": value} if is_image(value) else {})


def _brief(value: Any) -> Any:
    """The value as a line of the log has it: a tensor in few words."""
    return described(value) if isinstance(value, Tensor) else value
