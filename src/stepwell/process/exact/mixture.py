"""Gaussian mixtures: data whose predictions are exact on every path, whose tilts are known, and the oracles they give.

A component N(m, S) is N(alpha m, alpha^2 S + sigma^2 I) at time t of a path, so the marginal, the posterior of the data
and all four predictions are closed forms. A mixture tilted by a quadratic reward is a mixture again: the optimum of
E[r] - beta KL, which a method should arrive at, is known, with its evidence, reward and KL.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.rng import Rng
from stepwell.solver.exponential import coefficients
from stepwell.solver.path import PREDICTIONS, Path
from stepwell.solver.table import Table


@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k weights[k] N(means[k], covariances[k]): weights (K,), means (K, D), covariances (K, D, D), float64.

    Raises `InputError` for shapes that do not fit, weights that are negative or do not add up to 1, and covariances
    that are not symmetric and positive definite. Everything is differentiable in x, nothing in the parameters.

    Example:
        >>> from stepwell.solver.path import Linear
        >>> data = Mixture(torch.ones(1), torch.tensor([[1.0, 0.0]]), 0.5 * torch.eye(2)[None])
        >>> data.predict(torch.zeros(1, 2), 1.0, Linear(), "data").tolist()
        [[1.0, 0.0]]
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    _values: Tensor = field(init=False, repr=False)  # (K, D), eigenvalues of the covariances, and their eigenvectors
    _vectors: Tensor = field(init=False, repr=False)  # in columns: a time for each row then costs no inverse a row

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().double())
        wrong = self._wrong()
        if wrong:
            raise InputError(f"A mixture's {wrong}")
        values, vectors = torch.linalg.eigh(self.covariances)
        if not bool((values > 0).all()):
            raise InputError("A mixture's covariances must be positive definite.")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_vectors", vectors)

    def _wrong(self) -> str | None:
        weights, means, covariances = self.weights, self.means, self.covariances
        if weights.dim() != 1 or means.dim() != 2 or covariances.shape != (*means.shape, means.shape[-1]):
            shapes = ", ".join(str(tuple(value.shape)) for value in (weights, means, covariances))
            return f"shapes must be (K,), (K, D) and (K, D, D), got {shapes}."
        if len(weights) != len(means) or not len(weights):
            return f"weights must be as many as its means, {len(means)}, got {len(weights)}."
        if not all(bool(value.isfinite().all()) for value in (weights, means, covariances)):
            return "weights, means and covariances must be finite."
        if bool((weights < 0).any()) or abs(float(weights.sum()) - 1.0) > 1e-6:
            return f"weights must be at least 0 and add up to 1, got {weights.tolist()}."
        if not torch.allclose(covariances, covariances.mT, rtol=1e-9, atol=1e-12):
            return "covariances must be symmetric."
        return None

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """E[x], (D,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Cov[x], (D, D)."""
        offsets = self.means - self.mean
        return torch.einsum("k,kde->de", self.weights, self.covariances + offsets[:, :, None] * offsets[:, None])

    def sample(self, count: int, rng: Rng) -> Tensor:
        """Independent draws, (count, D)."""
        component = rng.categorical(self.weights.expand(count, -1))
        noise = rng.normal(count, self.dimension, dtype=torch.float64).to(self.means.device)
        scaled = self._values[component].sqrt() * noise
        return self.means[component] + torch.einsum("nde,ne->nd", self._vectors[component], scaled)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), (N, D) -> (N,) float64."""
        return self._components(x, 1.0, 0.0)[2].logsumexp(1)

    def marginal(self, path: Path, t: float) -> Mixture:
        """The distribution of x_t = alpha x_0 + sigma e: the mixture itself at t = 0, pure noise where alpha = 0."""
        alpha, sigma = path.alpha(float(t)), path.sigma(float(t))
        noise = sigma**2 * torch.eye(self.dimension, dtype=torch.float64)
        return Mixture(self.weights, alpha * self.means, alpha**2 * self.covariances + noise)

    def posterior(self, x: Tensor, path: Path, t: float) -> Mixture:
        """The distribution of x_0 given x_t = x, for one x (D,). Raises `InputError` at t = 0, where x_0 is x."""
        alpha, sigma = path.alpha(float(t)), path.sigma(float(t))
        if sigma == 0.0:
            raise InputError("t must be above 0 for a posterior, got 0: without noise the data given x is x itself.")
        offsets, variances, logs = self._components(x[None], alpha, sigma)
        shrunk = sigma**2 * self._values / variances
        covariances = torch.einsum("kde,ke,kfe->kdf", self._vectors, shrunk, self._vectors)
        moved = torch.einsum("kde,ke->kd", self._vectors, alpha * self._values / variances * offsets[0])
        return Mixture(logs[0].softmax(0), self.means + moved, 0.5 * (covariances + covariances.mT))

    def predict(self, x: Tensor, t: float | Tensor, path: Path, kind: str = "velocity") -> Tensor:
        """The exact prediction (`path.PREDICTIONS`) at x (N, D) and t, a number or (N,); of the dtype of x.

        It exists at both ends: at t = 0 the noise is 0 and the velocity alpha' x - sigma sigma' S, in the limit where
        sigma' is infinite; at t = 1 of a path with alpha(1) = 0 the data is the mean. Formulas: `solver.path`.
        """
        if kind not in PREDICTIONS:
            raise UnknownName("prediction", kind, PREDICTIONS)
        if isinstance(t, Tensor) and t.dim() > 0:
            if t.shape != x.shape[:1]:
                raise InputError(f"t must be a number or ({len(x)},), one time a state, got shape {tuple(t.shape)}.")
            time: Any = t.to(x.device, torch.float64)[:, None, None]
        else:
            time = float(t)
        alpha, sigma = path.alpha(time), path.sigma(time)
        offsets, variances, logs = self._components(x, alpha, sigma)
        weights, vectors = logs.softmax(1)[:, :, None], self._vectors.to(x.device)
        solved = offsets / variances

        def data() -> Tensor:
            moved = torch.einsum("kde,nke->nkd", vectors, alpha * self._values.to(x.device) * solved)
            return (weights * (self.means.to(x.device) + moved)).sum(1)

        def score() -> Tensor:
            return -(weights * torch.einsum("kde,nke->nkd", vectors, solved)).sum(1)

        def flat(number: Any) -> Any:  # (N, 1, 1) -> (N, 1)
            return number[:, 0] if isinstance(number, Tensor) else number

        if kind == "data":
            prediction = data()
        elif kind == "velocity":
            prediction = flat(path.alpha_rate(time)) * data() - flat(_half_variance_rate(path, time)) * score()
        else:
            prediction = score() if kind == "score" else -flat(sigma) * score()
        return prediction.to(x.dtype)

    def _components(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x - alpha m in each component's eigenvectors (N, K, D), the variances there, and log w_k p_k(x), (N, K)."""
        if x.dim() != 2 or x.shape[1] != self.dimension:
            raise InputError(f"x must be (N, {self.dimension}), states of this mixture, got {tuple(x.shape)}.")
        means, values, vectors = (part.to(x.device) for part in (self.means, self._values, self._vectors))
        offsets = torch.einsum("kde,nkd->nke", vectors, x.double()[:, None] - alpha * means)
        variances = alpha**2 * values + sigma**2
        logs = -0.5 * (offsets**2 / variances + variances.log() + math.log(2 * math.pi)).sum(-1)
        return offsets, variances, self.weights.to(x.device).log() + logs

    def tilted(self, linear: Tensor, quadratic: Tensor) -> tuple[Mixture, float]:
        """p(x) exp(b.x - x'Qx / 2) / Z as a mixture, with b (D,) and Q (D, D), and log Z, the log of E_p[exp(...)].

        N(m, S) becomes N(m + S' y, S'), S' = (S^-1 + Q)^-1, y = b - Q m, and its weight is multiplied by
        exp(b.m - m'Qm / 2 + y'S'y / 2) / sqrt(det(1 + S Q)). Q may be indefinite as long as that can be normalised;
        raises `InputError` where it cannot.
        """
        b, q = (torch.as_tensor(part).detach().double() for part in (linear, quadratic))
        if b.shape != self.means.shape[1:] or q.shape != self.covariances.shape[1:]:
            raise InputError(
                f"linear and quadratic must be ({self.dimension},) and ({self.dimension}, {self.dimension}), got "
                f"{tuple(b.shape)} and {tuple(q.shape)}."
            )
        q = 0.5 * (q + q.mT)
        factor = torch.linalg.cholesky(self.covariances)
        change = torch.eye(self.dimension, dtype=torch.float64) + factor.mT @ q @ factor
        root, failed = torch.linalg.cholesky_ex(change)
        if bool(failed.any()) or not bool(change.isfinite().all()):
            raise InputError("The tilt outgrows a component of the mixture, so that the result cannot be normalised.")
        half = torch.linalg.solve_triangular(root, factor.mT, upper=False)
        covariances = half.mT @ half
        pull = b - self.means @ q
        moved = torch.einsum("kde,ke->kd", covariances, pull)
        logs = self.means @ b - 0.5 * ((self.means @ q) * self.means).sum(1) + 0.5 * (pull * moved).sum(1)
        logs = self.weights.log() + logs - root.diagonal(dim1=1, dim2=2).log().sum(1)
        return Mixture(logs.softmax(0), self.means + moved, covariances), float(logs.logsumexp(0))


def _half_variance_rate(path: Path, t: Any) -> Any:
    """sigma sigma' = (d sigma^2 / dt) / 2, also at t = 0 where sigma' may be infinite: there sigma^2 is 1 - alpha^2."""
    sigma, rate, limit = path.sigma(t), path.sigma_rate(t), -path.alpha(t) * path.alpha_rate(t)
    if isinstance(rate, Tensor):
        return torch.where(rate.isfinite(), sigma * rate, limit)
    return sigma * rate if math.isfinite(rate) else limit


@dataclass(frozen=True)
class Optimum:
    """The p that maximises E_p[r] - beta KL(p || start): start exp(r / beta) / Z, whose value is beta log Z."""

    distribution: Mixture
    reward: float
    kl: float
    value: float


@dataclass(frozen=True, eq=False)
class Quadratic:
    """r(x) = -strength |x - target|^2 / 2, with target (D,)."""

    target: Tensor
    strength: float = 1.0

    def value(self, x: Tensor) -> Tensor:
        """r, (..., D) -> (...,), differentiable."""
        return -0.5 * self.strength * ((x - self.target.to(x)) ** 2).sum(-1)

    def expected(self, mixture: Mixture) -> float:
        """E[r] exactly."""
        spread = mixture.covariance.trace() + ((mixture.mean - self.target.double()) ** 2).sum()
        return float(-0.5 * self.strength * spread)

    def optimum(self, start: Mixture, beta: float) -> Optimum:
        """The KL-regularised optimum, in closed form. Raises `InputError` unless beta > 0 and the optimum exists.

        Example:
            >>> start = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
            >>> round(Quadratic(torch.tensor([2.0])).optimum(start, beta=1.0).distribution.mean.item(), 12)
            1.0
        """
        if not beta > 0.0:
            raise InputError(f"beta must be above 0, got {beta}; without a KL the optimum is a point.")
        pull, target = self.strength / beta, self.target.double()
        best, log_evidence = start.tilted(pull * target, pull * torch.eye(start.dimension).double())
        log_evidence -= 0.5 * pull * float(target @ target)
        reward = self.expected(best)
        return Optimum(best, reward, reward / beta - log_evidence, beta * log_evidence)


Perturbation = Callable[[float], tuple[Tensor, Tensor]]
"""t -> A (D, D), b (D,): an affine change A x + b of the velocity at time t, which may carry gradients."""


def chain_moments(
    data: Mixture,
    path: Path,
    table: Table,
    times: Sequence[float],
    perturbation: Perturbation | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact means (n + 1, D) and covariances (n + 1, D, D) of a solver's states on Gaussian data, at every time.

    The velocity is the exact one, changed by `perturbation`; then a step x' = c x + w m + q z is affine, and
    mean' = M mean + w p, cov' = M cov M' + q^2 I, M = c I + w P for the prediction m = P x + p. Differentiable in the
    perturbation, so gradients of any function of the moments are exact too. The start is noise of standard deviation
    `scale`, sigma(times[0]) unless it is given (`Flow` begins with that of data of variance one). Raises `InputError`
    for more than one component and for solvers that use several predictions.
    """
    _only_one(data)
    if table.remembers or table.inner is not None:
        raise InputError(
            f"table must be a solver of one prediction a step, got '{table.name}', which uses several predictions."
        )
    eye, zero = torch.eye(data.dimension, dtype=torch.float64), torch.zeros(1, data.dimension, dtype=torch.float64)
    means, covariances = [zero[0]], [(path.sigma(times[0]) if scale is None else scale) ** 2 * eye]
    for time, target in itertools.pairwise(times):
        row = coefficients(path, table, (time,), target)
        offset = data.predict(zero, time, path)
        slope = (data.predict(eye, time, path) - offset).mT
        if perturbation is not None:
            change, shift = perturbation(time)
            slope, offset = slope + change, offset + shift
        slope = path.convert(slope, eye, time, "velocity", row.predicts)
        offset = path.convert(offset, zero, time, "velocity", row.predicts)
        matrix = row.state * eye + row.weights[0] * slope
        means.append(matrix @ means[-1] + row.weights[0] * offset[0])
        covariances.append(matrix @ covariances[-1] @ matrix.mT + row.noise**2 * eye)
    return torch.stack(means), torch.stack(covariances)


def flow_map(data: Mixture, path: Path, start: float, end: float) -> tuple[Tensor, Tensor]:
    """The ODE from time `start` to `end` on Gaussian data N(m, S), exactly: x -> A x + b, A (D, D), b (D,).

    A = C(end)^(1/2) C(start)^(-1/2) and b = alpha(end) m - alpha(start) A m, with C(t) = alpha^2 S + sigma^2 I, all of
    which commute. Raises `InputError` for more than one component.
    """
    _only_one(data)
    values, vectors = torch.linalg.eigh(data.covariances[0])
    begin, over = (path.alpha(t) ** 2 * values + path.sigma(t) ** 2 for t in (start, end))
    matrix = vectors @ torch.diag((over / begin).sqrt()) @ vectors.mT
    return matrix, path.alpha(end) * data.means[0] - path.alpha(start) * matrix @ data.means[0]


def _only_one(data: Mixture) -> None:
    if len(data.weights) != 1:
        raise InputError(f"data must have one component, so that steps are affine, got {len(data.weights)} components.")
