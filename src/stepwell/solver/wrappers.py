"""Corrections of a model's predictions: functions of a prediction function that return another one.

`predict(x (N, *D), t) -> (N, *D)` takes a time as a float, or as a tensor that broadcasts against x, e.g. (N, 1) for
(N, D), where rows are at different times. Wrappers are pure, keep the kind of prediction, and may be stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.rng import Rng
from stepwell.solver.path import PREDICTIONS, Path
from stepwell.writing import write_whole

Predict = Callable[[Tensor, Any], Tensor]


def predicting(predict: Predict, path: Path, source: str, target: str) -> Predict:
    """A model of kind `source` as one of kind `target` (`Path.convert`, with its errors)."""
    return lambda x, t: path.convert(predict(x, t), x, t, source, target)


def epsilon_scaled(predict: Predict, path: Path, *, base: float, slope: float = 0.0, output: str) -> Predict:
    """The noise prediction divided by base + slope t, t in [0, 1]; predictions of other kinds change along with it.

    Epsilon scaling (Ning et al. 2023, arXiv 2308.15321, lambda(t) = k t + b; their t counts steps, so that their k is
    `slope` over the number of training steps). It undoes a model that overstates the noise by that factor, as models
    do on their own samples; the authors' scripts have values from 1.0012 to 1.017. Where nothing of the data is left
    the noise is x / sigma whatever the model predicts, and the prediction stays as it is.
    """

    def corrected(x: Tensor, t: Any) -> Tensor:
        divisor = base + slope * t
        if bool(torch.as_tensor(divisor <= 0.0).any()):
            raise InputError(f"base + slope t must be positive, since epsilon scaling divides by it; got {divisor}.")
        prediction = predict(x, t)
        noise = path.convert(prediction, x, t, output, "noise")
        return prediction + _effect(path, t, output) * (1.0 / divisor - 1.0) * noise

    _known(output)
    return corrected


def _known(output: str) -> None:
    if output not in PREDICTIONS:
        raise UnknownName("prediction", output, PREDICTIONS)


def _effect(path: Path, t: Any, kind: str) -> Any:
    """The change of a prediction of this kind with the noise prediction, at the same x; 0 where alpha is 0."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    some = torch.as_tensor(alpha != 0.0)  # of the data is left
    alpha = torch.where(some, torch.as_tensor(alpha), 1.0) if isinstance(t, Tensor) else alpha or 1.0
    if kind == "noise":
        effect = 1.0 + 0.0 * alpha
    elif kind == "data":
        effect = -sigma / alpha
    elif kind == "score":
        effect = -1.0 / sigma
    else:
        effect = path.sigma_rate(t) - path.alpha_rate(t) * sigma / alpha
    return torch.where(some, torch.as_tensor(effect), 0.0) if isinstance(t, Tensor) else effect * float(some)


@dataclass(frozen=True)
class Calibration:
    """The mean error of a model: `offsets` (K, *D) at K falling times, of predictions of kind `output`."""

    times: tuple[float, ...]
    offsets: Tensor
    output: str

    def __post_init__(self) -> None:
        _known(self.output)
        if len(self.times) != len(self.offsets) or list(self.times) != sorted(set(self.times), reverse=True):
            raise InputError(
                f"offsets must be one at each of {len(self.times)} falling times, got {len(self.offsets)}."
            )

    def at(self, t: Any) -> Tensor:
        """The offset at t, linear between the times: (*D) for a float, (N, *D) for N times. Refuses times outside."""
        times = torch.tensor(self.times[::-1], dtype=torch.float64)
        wanted = torch.as_tensor(t, dtype=torch.float64, device="cpu").reshape(-1)
        if bool((wanted < times[0]).any()) or bool((wanted > times[-1]).any()):
            raise InputError(
                f"t must be between the calibration's times, {self.times[-1]:.6g} and {self.times[0]:.6g}, got "
                f"{float(wanted.min()):.6g} to {float(wanted.max()):.6g}."
            )
        offsets = self.offsets.flip(0)
        if len(times) == 1:
            values = offsets.expand(len(wanted), *offsets.shape[1:])
        else:
            above = torch.searchsorted(times, wanted).clamp(min=1)
            share = ((wanted - times[above - 1]) / (times[above] - times[above - 1])).to(offsets)
            above = above.to(offsets.device)
            values = torch.lerp(offsets[above - 1], offsets[above], share.reshape(-1, *[1] * (offsets.dim() - 1)))
        return values if isinstance(t, Tensor) and t.dim() else values[0]

    def save(self, file: str | FilePath) -> None:
        """Write it as safetensors."""
        from safetensors.torch import save

        tensors = {"times": torch.tensor(self.times, dtype=torch.float64), "offsets": self.offsets.contiguous()}
        write_whole(file, save(tensors, {"output": self.output}))


def load_calibration(file: str | FilePath) -> Calibration:
    """A calibration that was saved. Raises `InputError` where the file is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            times, offsets = opened.get_tensor("times"), opened.get_tensor("offsets")
            return Calibration(tuple(times.tolist()), offsets, (opened.metadata() or {})["output"])
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"{file} is not a saved calibration: {error}") from None


def calibrate(
    predict: Predict, data: Tensor, times: Sequence[float], path: Path, rng: Rng, *, output: str
) -> Calibration:
    """The mean of (prediction - truth) at each time, over data (N, *D) noised with drawn noise.

    Calibrated DPM (Pang et al. 2023, arXiv 2302.10688): the exact score has mean zero at every time, so a model's mean
    score is error, and taking it away lowers the score-matching loss by half its square. The other kinds follow: the
    mean noise prediction is zero, the mean data prediction that of the data. Each noise is used with both signs, so
    that the estimate is exact, without sampling error in the noise, for predictions that are affine in x. It costs
    2 N evaluations of a row at each time.
    """
    _known(output)
    offsets = []
    for time in times:
        half = rng.normal(*data.shape, dtype=data.dtype).to(data.device)
        noise, clean = torch.cat([half, -half]), torch.cat([data, data])
        x = path.noised(clean, noise, time)
        offsets.append((predict(x, time) - path.convert(clean, x, time, "data", output)).mean(0))
    return Calibration(tuple(float(time) for time in times), torch.stack(offsets), output)


def calibrated(predict: Predict, calibration: Calibration) -> Predict:
    """The model without its mean error; its predictions are of the calibration's kind."""
    return lambda x, t: predict(x, t) - calibration.at(t).to(x)


def time_shifted(
    predict: Predict,
    path: Path,
    *,
    window: float,
    cutoff: float,
    data_variance: float = 0.0,
    spacing: float = 0.001,
) -> Predict:
    """The model asked at the time whose noise level suits x, row by row, rather than at the solver's own time.

    The time-shift sampler (Li et al. 2023, arXiv 2305.15583): of the times within window / 2 of t, `spacing` apart,
    take the one at which the variance alpha^2 data_variance + sigma^2 is nearest to the variance of x over the
    coordinates of a row; ties go to the smallest shift. Not at t = 1, where x is noise by construction, nor at times
    up to `cutoff`. The published rule has data_variance = 0: it takes x for larger than noise alone, so that it moves
    t upwards even where x is exactly right. Give the data's variance within a row to remove that, but where
    alpha^2 data_variance + sigma^2 does not depend on t (variance-preserving path, variance 1) no time can be found.

    `window` and `cutoff` are fractions of the training time. The authors' code was run on CIFAR-10 with 1000 steps
    with (window, cutoff) of (0.005, 0.55) for 100 steps of F-PNDM, (0.03, 0.3) for 5 of DPM-Solver, (0.01, 0.9) for 5
    of DEIS, and (0.08, 0.3) for 5 of DDIM on the ADM network: they are searched for each case. The model's prediction
    at the shifted time is used as its prediction at t, of the same kind; the authors' is a noise prediction.

    The wrapped model is given a tensor of times (N, 1, ..., 1), or the float where no row is shifted.
    """
    if not (window >= 0.0 and spacing > 0.0 and 0.0 <= cutoff <= 1.0):
        raise InputError(
            f"window must be >= 0, spacing > 0 and cutoff in [0, 1], got {window}, {spacing} and {cutoff}."
        )
    steps = int(window / (2.0 * spacing) + 1e-9)
    shifts = sorted((spacing * step for step in range(-steps, steps + 1)), key=lambda shift: (abs(shift), shift))

    def shifted(x: Tensor, t: Any) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        moves = (times > cutoff) & (times < 1.0)
        if not bool(moves.any()):
            return predict(x, t)
        rows = x.flatten(1).double()
        if rows.shape[1] < 2:
            raise InputError("x must have two coordinates a row or more: a time shift needs the variance over them.")
        places = times + torch.tensor(shifts, dtype=torch.float64, device=x.device)[:, None]  # (candidates, N)
        expected = path.alpha(places) ** 2 * data_variance + path.sigma(places) ** 2
        gaps = (rows.var(1) - expected).abs()
        gaps = gaps.masked_fill((places <= 0.0) | (places > 1.0), torch.inf)
        best = (gaps <= gaps.min(0).values + 1e-9).int().argmax(0)
        chosen = torch.where(moves, places.gather(0, best[None])[0], times)
        if isinstance(t, float) and bool((chosen == t).all()):
            return predict(x, t)
        return predict(x, chosen.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)))

    return shifted
