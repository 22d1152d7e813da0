"""Phase space: its kernel against the moment ODEs, and integrators on Gaussian data, where every step is affine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor

from stepwell.errors import InputError
from stepwell.rng import Rng
from stepwell.solver import phase
from stepwell.solver.phase import PhaseSpace, apply, conjugate, euler, integrate, reverse, splitting

SPACE = PhaseSpace(beta=8.0, gamma=0.01, nu=4.01, kappa=0.04)  # as published for CIFAR-10
SPACES = [SPACE, PhaseSpace(4.0, 0.3, 2.3, 0.2), PhaseSpace(4.0, 0.0, 4.0, 0.04), PhaseSpace(3.0, 2.5, 0.5, 1.0)]
MEAN, VARIANCE = 0.7, 0.3  # of the data
START, END = 0.9, 0.05
ONE = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
def test_the_kernel_solves_the_equations_of_the_moments(space: PhaseSpace):
    """Mean' = F mean, Sigma' = F Sigma + Sigma F^T + diffusion, by a Runge-Kutta method."""
    drift, diffusion = space.drift, space.diffusion

    def rate(_t: float, values: list[float]) -> list[float]:
        mean, sigma = torch.tensor(values[:2]).double(), torch.tensor(values[2:]).double().view(2, 2)
        change = drift @ sigma + sigma @ drift.T + diffusion
        return [*(drift @ mean).tolist(), *change.flatten().tolist()]

    begin = [1.0, 0.0, 0.0, 0.0, 0.0, space.kappa * space.mass]
    for t in (0.1, 0.5, 1.0):
        solved = torch.tensor(solve_ivp(rate, (0.0, t), begin, rtol=1e-11, atol=1e-13).y[:, -1])
        assert torch.allclose(space.transition(0.0, t)[:, 0], solved[:2], atol=1e-9)
        assert torch.allclose(space.covariance(t), solved[2:].view(2, 2), atol=1e-9)
        assert torch.allclose(space.transition(0.2, t), torch.tensor(expm((t - 0.2) * drift.numpy())), atol=1e-12)
        span = space.beta * t
        published = torch.tensor([1.0 + (space.nu - space.gamma) / 4.0 * span, -span / 2.0], dtype=torch.float64)
        published *= math.exp(-(space.nu + space.gamma) / 4.0 * span)
        assert torch.allclose(space.transition(0.0, t)[:, 0], published, atol=1e-14)
    kept = drift @ space.stationary + space.stationary @ drift.T + diffusion
    assert float(kept.abs().max()) < 1e-14


def test_it_ends_at_its_stationary_law_and_begins_at_the_data():
    end = SPACE.covariance(1.0, position=VARIANCE) - SPACE.stationary
    assert float(end.abs().max()) < 200 * math.exp(-8.0 * 4.02 / 2)  # (1 + B + B^2) exp(-B (gamma + nu) / 2)
    assert torch.allclose(SPACE.covariance(0.0, position=VARIANCE), torch.tensor([0.3, 0.01]).double().diag())
    data = torch.ones(3, 5, dtype=torch.float64)
    drawn = SPACE.noised(data, torch.zeros(3, 2, 5, dtype=torch.float64), 0.3)
    assert torch.allclose(drawn[:, 0], SPACE.transition(0.0, 0.3)[0, 0] * data)


def test_the_planted_mass_off_critical_damping_is_seen(monkeypatch):
    monkeypatch.setattr(PhaseSpace, "mass", property(lambda self: 4.4 / (self.gamma - self.nu) ** 2))
    assert not torch.allclose(SPACE.transition(0.0, 0.3), torch.tensor(expm(0.3 * SPACE.drift.numpy())), atol=1e-3)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_the_noise_that_made_a_state_is_the_gradient_of_its_log_density(t: float):
    noise, data = Rng(0).normal(4, 2, 3, dtype=torch.float64), Rng(1).normal(4, 3, dtype=torch.float64)
    z = SPACE.noised(data, noise, t).requires_grad_()
    mean = SPACE.noised(data, torch.zeros_like(noise), t)
    distribution = torch.distributions.MultivariateNormal(torch.zeros(2).double(), SPACE.covariance(t))
    (gradient,) = torch.autograd.grad(distribution.log_prob((z - mean).transpose(1, 2)).sum(), z)
    assert torch.allclose(gradient, SPACE.score(noise, t), rtol=1e-9)


def exact(space: PhaseSpace) -> Callable[[Tensor, float], Tensor]:
    """The score of data N(0.7, 0.3)."""

    def score(z: Tensor, t: float) -> Tensor:
        mean = MEAN * space.transition(0.0, t)[:, :1]
        return -apply(torch.linalg.inv(space.covariance(t, VARIANCE)), z - mean)

    return score


def noise_of(space: PhaseSpace) -> Callable[[Tensor, float], Tensor]:
    return lambda z, t: -apply(space.factor(t).T, exact(space)(z, t))


def error(space: PhaseSpace, step: phase.Step, times: list[float]) -> float:
    """How far the covariance at the last time is from the marginal's, begun at the marginal: steps are affine."""
    basis = torch.zeros(3, 2, 1, dtype=torch.float64)
    basis[1, 0, 0] = basis[2, 1, 0] = 1.0
    final = integrate(step, basis, times)[:, :, 0]
    matrix = (final[1:] - final[0]).T
    mean = matrix @ (MEAN * space.transition(0.0, times[0])[:, 0]) + final[0]
    assert torch.allclose(mean, MEAN * space.transition(0.0, times[-1])[:, 0], atol=0.2)
    found = matrix @ space.covariance(times[0], VARIANCE) @ matrix.T
    return float((found - space.covariance(times[-1], VARIANCE)).abs().max())


def between(steps: int) -> list[float]:
    return [START + (END - START) * step / steps for step in range(steps + 1)]


INTEGRATORS = {
    "euler": (lambda space: euler(space, exact(space)), 1, 200),
    "splitting": (lambda space: splitting(space, exact(space)), 2, 100),
    "conjugate": (lambda space: conjugate(space, noise_of(space)), 1, 100),
    "lambda-ddim-1": (lambda space: conjugate(space, noise_of(space), 0.5 * ONE), 1, 100),
    "lambda-ddim-2": (lambda space: conjugate(space, noise_of(space), torch.full((2, 2), 0.5)), 1, 100),
}


@pytest.mark.parametrize("name", INTEGRATORS)
@pytest.mark.parametrize("space", [SPACE, *(pytest.param(space, marks=pytest.mark.slow) for space in SPACES[1:3])])
def test_integrators_keep_the_marginal_at_their_order(space: PhaseSpace, name: str):
    build, order, steps = INTEGRATORS[name]
    coarse, fine = (error(space, build(space), between(count)) for count in (steps, 2 * steps))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_splitting_beats_euler_at_equal_evaluations():
    for steps in (50, 100):
        few = error(SPACE, splitting(SPACE, exact(SPACE)), between(steps))
        assert few < 0.5 * error(SPACE, euler(SPACE, exact(SPACE)), between(2 * steps))


def test_the_planted_euler_step_in_the_middle_makes_the_splitting_first_order():
    def planted(z: Tensor, time: float, target: float) -> Tensor:
        middle = 0.5 * (time + target)
        z = apply(SPACE.transition(time, middle), z)
        z = z - 0.5 * (target - time) * apply(SPACE.diffusion, exact(SPACE)(z, middle))
        return apply(SPACE.transition(middle, target), z)

    coarse, fine = (error(SPACE, planted, between(steps)) for steps in (200, 400))
    assert math.log2(coarse / fine) < 1.3


@pytest.mark.parametrize("space", [SPACE, *(pytest.param(space, marks=pytest.mark.slow) for space in SPACES[1:])])
def test_conjugate_integration_of_a_constant_noise_is_exact_in_one_step(space: PhaseSpace):
    """What DDIM is on a path, B = 0 is here: z' by Runge-Kutta with the noise held."""
    held = torch.tensor([[[0.8], [-1.3]]], dtype=torch.float64)
    z = torch.tensor([[[0.4], [0.2]]], dtype=torch.float64)

    def rate(t: float, values: list[float]) -> list[float]:
        state = torch.tensor(values).double().view(1, 2, 1)
        return space.velocity(state, space.score(held, t)).flatten().tolist()

    for time, target in [(0.8, 0.3), (0.3, 0.02)]:
        solved = solve_ivp(rate, (time, target), z.flatten().tolist(), rtol=1e-11, atol=1e-13).y[:, -1]
        found = conjugate(space, lambda _z, _t: held)(z, time, target)
        assert torch.allclose(found.flatten(), torch.tensor(solved), atol=1e-8)


def test_lambda_of_zero_is_no_lambda_and_the_kernel_reaches_the_data():
    z = Rng(2).normal(3, 2, 2, dtype=torch.float64)
    plain, zero = conjugate(SPACE, noise_of(SPACE)), conjugate(SPACE, noise_of(SPACE), 0.0 * ONE)
    assert torch.equal(plain(z, 0.5, 0.2), zero(z, 0.5, 0.2))
    assert bool(torch.isfinite(SPACE.kernel(0.3, 0.0, 0.0 * ONE)).all())
    parts = SPACE.transition(0.1, 0.0) @ SPACE.kernel(0.3, 0.1, 0.0 * ONE) + SPACE.kernel(0.1, 0.0, 0.0 * ONE)
    assert torch.allclose(SPACE.kernel(0.3, 0.0, 0.0 * ONE), parts, atol=1e-6)


def test_the_reverse_sde_keeps_the_marginal_at_order_one():
    """Sigma <- M Sigma M^T + noise, exactly, with M from the affine mean of each step."""
    space, errors = SPACES[1], []
    basis = torch.zeros(3, 2, 1, dtype=torch.float64)
    basis[1, 0, 0] = basis[2, 1, 0] = 1.0
    for steps in (400, 800):
        times = between(steps)
        sigma = space.covariance(times[0], VARIANCE)
        for time, target in itertools.pairwise(times):
            distribution = reverse(space, exact(space), basis, time, target)
            matrix = (distribution.mean[1:, :, 0] - distribution.mean[0, :, 0]).T
            sigma = matrix @ sigma @ matrix.T + distribution.standard_deviation.flatten().square().diag()
        errors.append(float((sigma - space.covariance(END, VARIANCE)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="differ"):
        PhaseSpace(8.0, 1.0, 1.0, 0.04)
    with pytest.raises(InputError, match="beta=0"):
        PhaseSpace(0.0, 1.0, 2.0, 0.04)
    with pytest.raises(InputError, match="gamma and nu"):
        reverse(SPACES[2], exact(SPACES[2]), torch.zeros(1, 2, 1), 0.5, 0.4)
