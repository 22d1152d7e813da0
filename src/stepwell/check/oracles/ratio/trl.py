"""The slope of TRL's GRPO loss in every step's log-probability, option by option, in plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stepwell.check.oracles.ratio.rows import Row, Slopes, Step, centred, clipped, each, standardised
from stepwell.check.oracles.ratio.slopes import define


@define("trl-grpo")
def _trl(rows: Sequence[Row], o: Mapping[str, Any]) -> Slopes:
    loss, whole = o["loss_type"], o["importance_sampling_level"] == "sequence"
    by = {"grpo": "row", "sapo": "row", "luspo": "row-sum", "dr_grpo": "fixed"}.get(loss, "token")
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    credit = standardised(rows) if o["scale_rewards"] == "group" else centred(rows)
    if o["scale_rewards"] == "batch":
        credit = [a / (statistics.stdev(row.reward for row in rows) + 1e-4) for a in credit]
    flat = sorted(step.entropy for row in rows for step in row.steps)
    place = (1 - o["top_entropy_quantile"]) * (len(flat) - 1)
    border = flat[math.floor(place)] + (place % 1) * (flat[math.ceil(place)] - flat[math.floor(place)])
    mode, cap = o["vllm_importance_sampling_mode"], o["vllm_importance_sampling_clip_max"]

    def rho(row: Row, step: Step) -> float:
        steps = row.steps if mode.startswith("sequence") else (step,)
        found = math.exp(math.fsum(s.old - s.behaviour for s in steps))
        return min(found, cap) if mode.endswith("truncate") else found * (found <= cap)

    def kept(row: Row, step: Step) -> float:
        return (step.entropy >= border) * (1.0 if mode is None or loss == "vespo" else rho(row, step))

    def gain(row: Row, step: Step, a: float) -> float:
        x = row.mean if whole else step.x
        if loss == "cispo":
            found = min(math.exp(x), high)
        elif loss == "sapo":
            tau = 1.0 if a > 0 else 1.05
            found = math.exp(x) / math.cosh(tau * (math.exp(x) - 1) / 2) ** 2
        elif loss == "vespo":
            k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            logs = 0.0 if mode is None else math.fsum(math.log(max(rho(row, s), 1e-8)) for s in row.steps)
            w = math.exp(max(row.total + logs, math.log(1e-8)))
            found = w**k * math.exp(rate * (1 - w))
        else:
            found = clipped(x, a, o["epsilon"], high)
            if o["delta"] is not None and a < 0 and math.exp(x) > o["delta"]:
                found = 0.0
        spread = whole and loss not in ("cispo", "vespo")  # the row's ratio has a gradient in all its steps
        factor = statistics.fmean(kept(row, s) for s in (row.steps if spread else (step,)))
        drift = statistics.fmean(s.behaviour - s.present for s in row.steps)
        threshold = o["off_policy_mask_threshold"]
        stale = threshold is not None and a < 0 and drift > threshold
        return found * factor * (not stale)

    answer = each(rows, credit, gain, by)
    weight = each(rows, [-1.0] * len(rows), lambda row, step, a: 1.0, by)
    for row in rows:
        excess = [step.present - step.reference for step in row.steps]
        for step, d in zip(row.steps, excess, strict=True):
            slope = 1 - math.exp(-d)
            if o["use_bias_correction_kl"]:  # d/dx of r k3, r the token's, or the row's that all its steps share
                k3 = [math.exp(-e) - 1 + e for e in excess] if whole else [math.exp(-d) - 1 + d]
                x = row.mean if whole else step.x
                slope = math.exp(x) * (slope + statistics.fmean(k3))
            answer[step.place] += o["beta"] * weight[step.place] * slope
    return answer
