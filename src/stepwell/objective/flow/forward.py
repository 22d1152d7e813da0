"""Losses on the forward path: predictions of the network around a sample, instead of the steps that led to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stepwell.batch import Batch, Read
from stepwell.credit.group import GroupCredit
from stepwell.errors import InputError
from stepwell.objective.preference.pairs import Pairs
from stepwell.objective.state import Coefficient, value_of
from stepwell.objective.surrogate import Clip, Surrogate
from stepwell.objective.term import Loss, Term
from stepwell.parts import Node, Part
from stepwell.process.abilities import Denoising, ability
from stepwell.process.models import Models
from stepwell.ranges import Count, Positive, Size
from stepwell.rng import Rng
from stepwell.tensors import Tensor, torch
from stepwell.trajectories import Trajectories

Weighting = Literal["uniform", "data", "time"]


@dataclass(frozen=True)
class Noised(Node):
    """Points around each final sample x_0 at which the network is evaluated: `points` pairs (t, e) for each row.

    x_t = alpha x_0 + sigma e. Times are uniform in (0, 1), or one of the sampler's own (`grid`). `shared`: rows of a
    prompt get the same pairs, so that they differ in nothing but the sample.
    """

    points: Size = 4
    grid: bool = False
    shared: bool = False

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        """time (N, K), noise (N, K, *D), target (N, K, *D): the velocity of the straight line from x_0 to e, and
        `reach` (N, K): |x_0hat - x_0| for a velocity that is off by one."""
        flow = ability(models.policy, Denoising, "A loss on the forward path")
        path = flow.path
        owner = rows.prompt.unique(return_inverse=True)[1] if self.shared else torch.arange(len(rows))
        count, shape = int(owner.max()) + 1, rows.action.shape[2:]
        kind = rows.action.dtype
        if self.grid:
            allowed = torch.tensor(flow.sampler.times[:-1], dtype=torch.float64)
            chosen = (rng.uniform(count, self.points) * len(allowed)).long().clamp(max=len(allowed) - 1)
            time = allowed[chosen]
        else:
            time = rng.uniform(count, self.points).double().clamp(1e-3, 1 - 1e-3)
        noise = rng.normal(count, self.points, *shape, dtype=kind)
        time, noise = time[owner].to(rows.action.device), noise[owner].to(rows.action.device)
        data = rows.action[torch.arange(len(rows)), rows.length - 1][:, None]
        t = time.reshape(*time.shape, *[1] * len(shape)).to(kind)
        target = path.alpha_rate(t) * data + path.sigma_rate(t) * noise
        determinant = path.alpha(time) * path.sigma_rate(time) - path.sigma(time) * path.alpha_rate(time)
        reach = (path.sigma(time) / determinant).to(kind)
        return {"time": time.to(kind), "noise": noise, "target": target, "reach": reach}


def mean_square(difference: Tensor) -> Tensor:
    """(N, K) the mean over dimensions of squares (N, K, *D)."""
    return difference.square().flatten(2).mean(2)


def _weight(batch: Batch, kind: Weighting) -> Tensor:
    """w(t) (N, K): 1; `time`, t; `data`, which makes a velocity's error that of the data it predicts."""
    if kind == "uniform":
        return torch.ones_like(batch.field("reach"))
    return batch.field("time") if kind == "time" else batch.field("reach").square()


@dataclass(frozen=True)
class DenoisingScore(Part):
    """s (N,) = -D mean_k w (|v - u|^2 - |v_ref - u|^2), squares averaged over dimensions, for log pi / ref.

    u is the velocity of the line that the point lies on (Wallace et al. 2023, arXiv 2311.12908, equation 14, where D
    stands for the number of steps T).
    """

    weight: Weighting = "data"
    scale: Positive = 1.0
    needs = frozenset({"forward"})
    reads = frozenset({Read("reference", "forward")})

    def __call__(self, batch: Batch) -> Tensor:
        target = batch.field("target")
        error = mean_square(batch.present("forward") - target) - mean_square(batch.field("reference_forward") - target)
        return -self.scale * (_weight(batch, self.weight) * error).mean(1)


@dataclass(frozen=True)
class ForwardPairs(Pairs):
    """Preference pairs scored by denoising errors, both samples of a pair at the same times and noises."""

    score: Part = field(default_factory=DenoisingScore)
    noised: Noised = field(default_factory=lambda: Noised(shared=True, grid=True))

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        return self.noised.draw(rows, models, rng)


@dataclass(frozen=True)
class ForwardPolicy(Term):
    """A policy loss whose log pi is -w(t) mean|v - u|^2 at drawn points; its ratio is against the policy that drew.

    u is the velocity of the line that the point lies on. Source: advantage weighted matching, AWM, arXiv 2509.25050.
    """

    credit_of: Part = field(default_factory=lambda: GroupCredit("mean", "std"))
    surrogate: Surrogate = field(default_factory=Clip)
    weight: Weighting = "uniform"
    noised: Noised = field(default_factory=Noised)
    coefficient: float | Coefficient = 1.0
    needs = frozenset({"forward"})
    reads = frozenset({Read("policy", "forward")})

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        return self.noised.draw(rows, models, rng)

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        return {"advantage": self.credit_of(batch)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        weight, target = _weight(batch, self.weight), batch.field("target")
        present, old = (
            -weight * mean_square(velocity - target)
            for velocity in (batch.present("forward"), batch.field("old_forward"))
        )
        advantage = targets["advantage"].to(present.dtype)[:, None].expand_as(present)
        each = self.surrogate(present - old, advantage, batch)
        value = value_of(self.coefficient, batch) * each.sum() / (batch.counts.rows * present.shape[1])
        clipped = self.surrogate.clipped(present - old, advantage).to(present.dtype).sum() / present.shape[1]
        return Loss(value, {"policy_loss": value.detach(), "clip_fraction": clipped / batch.counts.rows})


@dataclass(frozen=True)
class NegativeAware(Term):
    """[r |x0(v+) - x_0|^2 + (1 - r) |x0(v-) - x_0|^2] / beta, with r = 1/2 + clip(A, -C, C) / (2 C).

    v+ = beta v + (1 - beta) v_old pulls towards good samples and v- = (1 + beta) v_old - beta v away from bad ones;
    v_old is the sampler's, x0(v) the data that a velocity v predicts. Squares are means over dimensions.
    Source: DiffusionNFT, arXiv 2509.16117.
    """

    credit_of: Part = field(default_factory=lambda: GroupCredit("mean", "std"))
    beta: Positive = 1.0
    bound: Positive = 1.0
    weight: Weighting = "data"
    noised: Noised = field(default_factory=Noised)
    coefficient: float | Coefficient = 1.0
    needs = frozenset({"forward"})
    reads = frozenset({Read("policy", "forward")})

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        return self.noised.draw(rows, models, rng)

    def credit(self, batch: Batch) -> dict[str, Tensor]:
        advantage = self.credit_of(batch).clamp(-self.bound, self.bound)
        return {"good": 0.5 + advantage / (2 * self.bound)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        present, old, target = batch.present("forward"), batch.field("old_forward"), batch.field("target")
        good = targets["good"].to(present.dtype)[:, None]
        towards = mean_square(self.beta * present + (1 - self.beta) * old - target)
        away = mean_square((1 + self.beta) * old - self.beta * present - target)
        each = _weight(batch, self.weight) * (good * towards + (1 - good) * away) / self.beta
        value = value_of(self.coefficient, batch) * each.sum() / (batch.counts.rows * each.shape[1])
        drift = mean_square(present.detach() - old).sum() / (batch.counts.rows * each.shape[1])
        return Loss(value, {"policy_loss": value.detach(), "velocity_drift": drift})


@dataclass(frozen=True)
class DirectReward(Term):
    """-r(x_0), differentiated through the last `depth` steps that led to x_0 (all of them for None).

    `up_to` draws each row's depth uniformly from depth..up_to (AlignProp's random truncation, Prabhudesai et al. 2023,
    arXiv 2310.03739). `renoised` > 0 instead denoises that many noisings of x_0 at the sampler's last time, by one step
    (DRaFT-LV). `pinned` differentiates along the trajectory as it was drawn, by however old parameters: the adjoint of
    Implicit Diffusion (Marion et al. 2024, arXiv 2402.05468). Source: DRaFT, Clark et al. 2023, arXiv 2309.17400.
    """

    depth: Size | None = None
    up_to: Size | None = None
    renoised: Count = 0
    pinned: bool = False
    coefficient: float | Coefficient = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.up_to is not None and self.up_to < (self.depth or 1):
            raise InputError(f"DirectReward.up_to must be at least depth = {self.depth or 1}, got {self.up_to}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"denoised" if self.renoised else "pinned" if self.pinned else "sample"})

    def draw(self, rows: Trajectories, models: Models, rng: Rng) -> dict[str, Tensor]:
        sampler = ability(models.policy, Denoising, "A reward that is differentiated").sampler
        steps = len(sampler.times) - 1
        if self.renoised:
            shape = (len(rows), self.renoised)
            time = torch.full(shape, sampler.times[-2], dtype=rows.action.dtype)
            noise = rng.normal(*shape, *rows.action.shape[2:], dtype=rows.action.dtype)
            return {"time": time.to(rows.action.device), "noise": noise.to(rows.action.device)}
        least = min(self.depth or steps, steps)
        most = min(self.up_to or least, steps)
        spread = (rng.uniform(len(rows)) * (most - least + 1)).long().clamp(max=most - least)
        return {"depth": (least + spread).to(rows.action.device)}

    def loss(self, batch: Batch, targets: Mapping[str, Tensor]) -> Loss:
        assert batch.judge is not None
        if self.renoised:
            samples = batch.present("denoised")
            ids = batch.rows.prompt.repeat_interleave(samples.shape[1])
            reward = batch.judge(samples.flatten(0, 1), ids).reshape(len(batch), -1).mean(1)
        else:
            reward = batch.judge(batch.present("pinned" if self.pinned else "sample"), batch.rows.prompt)
        value = -value_of(self.coefficient, batch) * reward.sum() / batch.counts.rows
        return Loss(value, {"reward_loss": value.detach()})
