"""Phase space: data with a momentum beside it, noised by a linear SDE in both (PSLD), and the integrators for it.

Pandey and Mandt 2023 (arXiv 2303.01748): z = (x, m), from t = 0, data, to t = 1, noise,

    dz = (beta / 2) F z dt + sqrt(beta) diag(sqrt(gamma), sqrt(mass nu)) dw,     F = [[-gamma, 1 / mass], [-1, -nu]],

at critical damping, 1 / mass = (gamma - nu)^2 / 4; gamma = 0 is the critically damped Langevin diffusion of Dockhorn et
al. (arXiv 2112.07068). States are tensors (N, 2, *D), positions at [:, 0] and momenta at [:, 1]; 2 by 2 matrices are in
double precision. The probability-flow ODE is dz/dt = (beta / 2) (F z - diag(gamma, mass nu) S), S the score in z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stepwell.distributions import Gaussian
from stepwell.errors import InputError

Score = Callable[[Tensor, float], Tensor]
"""(z (N, 2, *D), t) -> the score, or for `conjugate` the noise prediction, of the same shape."""
Step = Callable[[Tensor, float, float], Tensor]
"""(z (N, 2, *D), time, target) -> z at the target."""


def apply(matrix: Tensor, z: Tensor) -> Tensor:
    """A 2 by 2 matrix on the position and momentum of every coordinate."""
    return torch.einsum("ij,nj...->ni...", matrix.to(z), z)


@dataclass(frozen=True)
class PhaseSpace:
    """The forward process. `kappa` is the variance of the first momentum in units of the mass.

    Raises `InputError` unless beta and kappa are positive and gamma, nu not negative and different.

    Example:
        >>> space = PhaseSpace(beta=8.0, gamma=0.01, nu=4.01, kappa=0.04)  # as published for CIFAR-10
        >>> space.mass, [round(float(value), 4) for value in space.covariance(1.0).diagonal()]
        (0.25, [1.0, 0.25])
    """

    beta: float
    gamma: float
    nu: float
    kappa: float

    def __post_init__(self) -> None:
        if not (self.beta > 0.0 and self.kappa > 0.0 and min(self.gamma, self.nu) >= 0.0 and self.gamma != self.nu):
            raise InputError(
                "beta and kappa must be positive, gamma and nu must be at least 0 and differ, got "
                f"beta={self.beta}, gamma={self.gamma}, nu={self.nu}, kappa={self.kappa}."
            )

    @property
    def mass(self) -> float:
        return 4.0 / (self.gamma - self.nu) ** 2

    @property
    def drift(self) -> Tensor:
        """(beta / 2) F."""
        rows = [[-self.gamma, 1.0 / self.mass], [-1.0, -self.nu]]
        return 0.5 * self.beta * torch.tensor(rows, dtype=torch.float64)

    @property
    def diffusion(self) -> Tensor:
        """beta diag(gamma, mass nu), the noise's covariance per unit of time."""
        return self.beta * torch.tensor([self.gamma, self.mass * self.nu], dtype=torch.float64).diag()

    @property
    def stationary(self) -> Tensor:
        """diag(1, mass): the covariance that the process keeps, and comes close to at the end."""
        return torch.tensor([1.0, self.mass], dtype=torch.float64).diag()

    def _moved(self, spans: Tensor) -> Tensor:
        """exp(span drift) (K, 2, 2): as both eigenvalues of F are -(gamma + nu) / 2, its series ends."""
        rate, one = -0.25 * self.beta * (self.gamma + self.nu), torch.eye(2, dtype=torch.float64)
        return (rate * spans).exp()[:, None, None] * (one + spans[:, None, None] * (self.drift - rate * one))

    def _covariances(self, times: Tensor, position: float = 0.0) -> Tensor:
        start = torch.tensor([position, self.kappa * self.mass], dtype=torch.float64).diag()
        moved = self._moved(times)
        return self.stationary + moved @ (start - self.stationary) @ moved.mT

    def transition(self, start: float, end: float) -> Tensor:
        """exp((end - start) drift): the factor of the mean from `start` to `end`."""
        return self._moved(torch.tensor([end - start], dtype=torch.float64))[0]

    def covariance(self, t: float, position: float = 0.0) -> Tensor:
        """The covariance of z_t where the data's coordinates have variance `position`; 0: of z_t given x_0."""
        return self._covariances(torch.tensor([t], dtype=torch.float64), position)[0]

    def factor(self, t: float) -> Tensor:
        """L, lower triangular, with L L^T the covariance of z_t given x_0."""
        return torch.linalg.cholesky(self.covariance(t))

    def noised(self, data: Tensor, noise: Tensor, t: float) -> Tensor:
        """z_t (N, 2, *D) from data (N, *D) and noise (N, 2, *D)."""
        start = torch.stack([data, torch.zeros_like(data)], 1)
        return apply(self.transition(0.0, t), start) + apply(self.factor(t), noise)

    def score(self, noise: Tensor, t: float) -> Tensor:
        """The score that a noise prediction (N, 2, *D) stands for: -L^-T noise."""
        return -apply(torch.linalg.inv(self.factor(t)).T, noise)

    def velocity(self, z: Tensor, score: Tensor) -> Tensor:
        """dz/dt of the probability-flow ODE, given the score at z."""
        return apply(self.drift, z) - 0.5 * apply(self.diffusion, score)

    def kernel(self, start: float, end: float, matrix: Tensor) -> Tensor:
        """int_start^end exp((s - end) (matrix - drift)) diffusion / 2 L_s^-T ds: a constant noise's part of a step.

        By Gauss-Legendre in sqrt(s), in which L_s^-T, which is as s^-1/2 near the data, is smooth.
        """
        nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(NODES))
        low, high = math.sqrt(start), math.sqrt(end)
        roots = 0.5 * (low + high) + 0.5 * (high - low) * nodes
        inner = torch.linalg.matrix_exp((roots.square() - end)[:, None, None] * (matrix - self.drift))
        factors = torch.linalg.inv(torch.linalg.cholesky(self._covariances(roots.square()))).mT
        total: Tensor = torch.einsum(
            "k,kij->ij", 0.5 * (high - low) * weights * roots, inner @ self.diffusion @ factors
        )
        return total


NODES = 32


def euler(space: PhaseSpace, score: Score) -> Step:
    """Euler's method for the ODE: order 1, one evaluation."""

    def step(z: Tensor, time: float, target: float) -> Tensor:
        return z + (target - time) * space.velocity(z, score(z, time))

    return step


def splitting(space: PhaseSpace, score: Score) -> Step:
    """The linear part exactly for half a step, the score's part for one, the linear part again: order 2.

    Strang's symmetric splitting. As the score depends on what it moves, its part is a midpoint step, with two
    evaluations, at the time in the middle: a single Euler step there would be of order 1.
    """

    def step(z: Tensor, time: float, target: float) -> Tensor:
        middle, half = 0.5 * (time + target), 0.5 * (target - time)
        z = apply(space.transition(time, middle), z)
        inner = z - 0.5 * half * apply(space.diffusion, score(z, middle))
        z = z - half * apply(space.diffusion, score(inner, middle))
        return apply(space.transition(middle, target), z)

    return step


def conjugate(space: PhaseSpace, noise: Score, matrix: Tensor | None = None) -> Step:
    """Euler in A_t z, A_t = exp(t (B - drift)), with a noise prediction: order 1, one evaluation.

    Conjugate integrators (Pandey et al. 2024, arXiv 2310.07894). `matrix` is B (2, 2): None for 0, where the linear
    part is exact and a constant noise is integrated exactly, as in DDIM; a multiple of the identity, or of the matrix
    of ones, is their lambda-DDIM I and II.
    """
    b = torch.zeros(2, 2, dtype=torch.float64) if matrix is None else matrix.double()

    def step(z: Tensor, time: float, target: float) -> Tensor:
        h = target - time
        moved = torch.linalg.matrix_exp(-h * (b - space.drift)) @ (torch.eye(2, dtype=torch.float64) + h * b)
        return apply(moved, z) + apply(space.kernel(time, target, b), noise(z, time))

    return step


def reverse(space: PhaseSpace, score: Score, z: Tensor, time: float, target: float) -> Gaussian:
    """The Euler-Maruyama step of the reverse SDE: the distribution of z at `target`, exactly Gaussian given z.

    Raises `InputError` where gamma or nu is 0: the step then has no density.
    """
    if space.gamma == 0.0 or space.nu == 0.0:
        raise InputError("gamma and nu must be positive: a reverse step needs noise in position and momentum.")
    drift = apply(space.drift, z) - apply(space.diffusion, score(z, time))
    scale = ((time - target) * space.diffusion.diagonal()).sqrt().to(z)
    return Gaussian(z + (target - time) * drift, scale.view(2, *(1,) * (z.dim() - 2)))


def integrate(step: Step, z: Tensor, times: Sequence[float]) -> Tensor:
    """z (N, 2, *D) at the last of falling times."""
    for time, target in itertools.pairwise(times):
        z = step(z, float(time), float(target))
    return z
