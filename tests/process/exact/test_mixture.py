"""Mixtures against quadrature and Bayes' rule, their tilts against densities, moments against runs of the solver."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepwell.errors import InputError, UnknownName
from stepwell.process.exact import mixture
from stepwell.process.exact.distance import sliced_wasserstein
from stepwell.process.exact.mixture import Mixture, Quadratic, chain_moments, flow_map
from stepwell.rng import Rng
from stepwell.solver import grid
from stepwell.solver.exponential import coefficients
from stepwell.solver.integrate import sample
from stepwell.solver.path import PATHS, PREDICTIONS, Linear, Path, path
from stepwell.solver.table import TABLES, Table, table

DATA = Mixture(
    torch.tensor([0.3, 0.5, 0.2]),
    torch.tensor([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.4]], [[0.25, 0.0], [0.0, 0.25]]]),
)
GAUSS = Mixture(torch.ones(1), torch.tensor([[0.7, -0.4]]), torch.tensor([[[0.5, 0.2], [0.2, 0.3]]]))
X = torch.tensor([[0.0, 0.0], [-1.2, 0.8], [2.0, -0.5]], dtype=torch.float64)
TARGET = torch.tensor([1.5, -0.5])


def on_path(name: str) -> Path:
    return path(name, maximum=3.0) if name == "ve" else path(name)


def plane(width: float = 7.0, step: float = 0.05) -> tuple[Tensor, float]:
    """Points of a square (M, 2) and the area of each: for smooth, narrow functions the sum is exact to rounding."""
    axis = torch.arange(-width, width + step / 2, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), step**2


def data_by_quadrature(prior: Mixture, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t = x] (N, 2) and log p_t(x) (N,) as integrals over x_0."""
    points, area = plane()
    joint = prior.log_density(points) - ((x[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2)
    total = joint.logsumexp(1)
    return (joint - total[:, None]).exp() @ points, total + math.log(area) - math.log(2 * math.pi * sigma**2)


# the mixture


def test_the_density_is_that_of_the_components():
    logs = [
        math.log(w) + torch.distributions.MultivariateNormal(m, covariance_matrix=s).log_prob(X)
        for w, m, s in zip(DATA.weights, DATA.means, DATA.covariances, strict=True)
    ]
    torch.testing.assert_close(DATA.log_density(X), torch.stack(logs).logsumexp(0), rtol=1e-12, atol=0)


def test_moments_are_integrals_of_the_density():
    points, area = plane()
    density = DATA.log_density(points).exp() * area
    mean = density @ points
    torch.testing.assert_close(DATA.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(DATA.covariance, (density[:, None] * (points - mean)).mT @ (points - mean))


def test_samples_have_the_moments_within_four_standard_errors():
    drawn = DATA.sample(20_000, Rng(0))
    features = torch.cat([drawn, drawn**2, drawn.prod(1, keepdim=True)], 1)
    second = DATA.covariance + DATA.mean[:, None] * DATA.mean
    exact = torch.cat([DATA.mean, second.diagonal(), second[0, 1:]])
    assert bool(((features.mean(0) - exact).abs() < 4 * features.std(0) / 20_000**0.5).all())


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_predictions_and_marginals_are_integrals_over_the_data(name: str, t: float):
    on = on_path(name)
    data, log_marginal = data_by_quadrature(DATA, X, on.alpha(t), on.sigma(t))
    torch.testing.assert_close(DATA.predict(X, t, on, "data"), data, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(DATA.marginal(on, t).log_density(X), log_marginal, rtol=1e-9, atol=1e-9)
    for kind in PREDICTIONS:
        expected = on.convert(data, X, t, "data", kind)
        torch.testing.assert_close(DATA.predict(X, t, on, kind), expected, rtol=1e-8, atol=1e-8)


def test_a_planted_isotropic_posterior_is_seen():
    """The usual slip: the noise is added to the variances, but the covariances are taken for round ones."""
    spread = DATA.covariances.diagonal(dim1=1, dim2=2).mean(1)
    round_mixture = Mixture(DATA.weights, DATA.means, spread[:, None, None] * torch.eye(2))
    data, _ = data_by_quadrature(DATA, X, 0.4, 0.6)
    assert float((round_mixture.predict(X, 0.6, Linear(), "data") - data).abs().max()) > 0.01


@pytest.mark.parametrize("name", PATHS)
def test_the_score_is_the_gradient_of_the_marginal(name: str):
    on, x = on_path(name), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(DATA.marginal(on, 0.4).log_density(x).sum(), x)
    torch.testing.assert_close(DATA.predict(X, 0.4, on, "score"), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_predictions_exist_at_both_ends_and_are_the_limits(name: str):
    on = on_path(name)
    for kind, end in itertools.product(PREDICTIONS, (0.0, 1.0)):
        at = DATA.predict(X, end, on, kind)
        gaps = [float((DATA.predict(X, abs(end - step), on, kind) - at).abs().max()) for step in (1e-4, 1e-6)]
        assert gaps[1] <= 0.11 * gaps[0] + 1e-6  # at least as the root of the step, as sigma goes on the VP paths
    torch.testing.assert_close(DATA.predict(X, 0.0, on, "data"), X)
    assert float(DATA.predict(X, 0.0, on, "noise").abs().max()) == 0.0


def test_at_pure_noise_the_data_is_the_mean():
    torch.testing.assert_close(DATA.predict(X, 1.0, Linear(), "data"), DATA.mean.expand(3, 2))
    torch.testing.assert_close(DATA.predict(X, 1.0, Linear()), X - DATA.mean)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_each_row_may_have_a_time_of_its_own(name: str, kind: str):
    times = torch.tensor([0.0, 0.35, 1.0], dtype=torch.float64)
    found = DATA.predict(X, times, on_path(name), kind)
    each = [DATA.predict(X[i : i + 1], float(times[i]), on_path(name), kind)[0] for i in range(3)]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-9, atol=1e-9)


def test_predictions_keep_the_kind_of_number_and_pass_gradients():
    assert DATA.predict(X.float(), torch.full((3,), 0.5), Linear()).dtype == torch.float32
    assert torch.autograd.gradcheck(
        lambda x: DATA.predict(x, torch.tensor([0.1, 0.5, 1.0]), Linear()), X.clone().requires_grad_()
    )


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_obeys_bayes(name: str):
    on, t, points = on_path(name), 0.5, torch.tensor([[0.3, 0.1], [-2.0, 1.0]], dtype=torch.float64)
    alpha, sigma = on.alpha(t), on.sigma(t)
    for x in X:
        noise = torch.distributions.Normal(alpha * points, sigma).log_prob(x).sum(1)
        expected = DATA.log_density(points) + noise - DATA.marginal(on, t).log_density(x[None])
        posterior = DATA.posterior(x, on, t)
        torch.testing.assert_close(posterior.log_density(points), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior.mean, DATA.predict(x[None], t, on, "data")[0], rtol=1e-9, atol=1e-9)


# tilts


@pytest.mark.parametrize("q", [[[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, -1.0]]])
def test_a_tilt_has_the_tilted_density_and_its_evidence(q: list[list[float]]):
    """All is said by one identity in x, as the densities on both sides integrate to 1."""
    b, quadratic = torch.tensor([0.7, -1.1], dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    tilted, log_evidence = DATA.tilted(b, quadratic)
    expected = DATA.log_density(X) + X @ b - 0.5 * ((X @ quadratic) * X).sum(1) - log_evidence
    torch.testing.assert_close(tilted.log_density(X), expected, rtol=1e-10, atol=1e-10)


def test_tilts_add_up():
    b, q = torch.tensor([0.7, -1.1]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    once, first = DATA.tilted(b, q)
    twice, second = once.tilted(b, q)
    both, total = DATA.tilted(2 * b, 2 * q)
    assert first + second == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(twice.log_density(X), both.log_density(X), rtol=1e-10, atol=1e-10)


def test_a_law_that_cannot_be_normalised_is_refused():
    narrow = float(torch.linalg.eigvalsh(DATA.covariances).max())
    just = torch.eye(2) / narrow
    DATA.tilted(torch.zeros(2), -0.999 * just)
    for factor in (1.0 + 1e-9, 5.0):
        with pytest.raises(InputError, match="cannot be normalised"):
            DATA.tilted(torch.zeros(2), -factor * just)


def test_the_optimum_has_the_reward_and_kl_of_its_density_and_beats_all_other_tilts():
    reward, beta = Quadratic(TARGET, 0.8), 0.6
    best = reward.optimum(DATA, beta)
    points, area = plane()
    density = best.distribution.log_density(points).exp() * area
    kl = float(density @ (best.distribution.log_density(points) - DATA.log_density(points)))
    assert best.reward == pytest.approx(float(density @ reward.value(points)), rel=1e-9)
    assert best.kl == pytest.approx(kl, rel=1e-9)
    assert best.value == pytest.approx(best.reward - beta * best.kl, rel=1e-12)
    assert reward.expected(DATA) < best.value
    for other in (0.3, 0.5, 0.7, 1.5):
        found = reward.optimum(DATA, other)
        assert found.reward - beta * found.kl < best.value


def test_the_reward_is_differentiable():
    assert torch.autograd.gradcheck(Quadratic(TARGET, 0.8).value, X.clone().requires_grad_())


# Gaussian data


class Columns(Rng):
    """Noise that is 1 in one coordinate of one row a draw and 0 elsewhere: rows are the effects of single numbers."""

    drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        noise = torch.zeros(shape, dtype=torch.float64)
        for axis in range(2):
            noise[3 + 2 * self.drawn + axis, axis] = 1.0
        self.drawn += 1
        return noise


def change(t: float) -> tuple[Tensor, Tensor]:
    return t * torch.tensor([[0.2, -0.1], [0.3, 0.1]]).double(), torch.tensor([0.1, -0.2]).double() * (1 - t)


def moments_by_running(on: Path, name: str, times: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Row 0 has no noise, rows 1 and 2 the start's, and each further pair of rows one draw's."""

    def predict(x: Tensor, t: float) -> Tensor:
        matrix, shift = change(t)
        return GAUSS.predict(x, t, on) + x @ matrix.mT + shift

    x = torch.zeros(2 * len(times) + 3, 2, dtype=torch.float64)
    x[1, 0] = x[2, 1] = on.sigma(times[0])
    final = sample(predict, x, on, times, table(name), Columns(0)).final
    effects = final[1:] - final[0]
    return final[0], effects.mT @ effects


ONE_STEP = [name for name, row in TABLES.items() if not row.remembers and row.inner is None]
ANYWHERE = [name for name in ONE_STEP if table(name).noise not in ("flow", "dance")]  # these two: the linear path's
CHAINS = [*((name, "linear") for name in ONE_STEP), *((name, "vp-linear") for name in ANYWHERE)]


@pytest.mark.parametrize(("name", "kind"), CHAINS)
def test_moments_are_those_of_the_solver_run_on_every_noise(name: str, kind: str):
    on = path(kind)
    times = grid.uniform(6, on)
    mean, covariance = moments_by_running(on, name, times)
    means, covariances = chain_moments(GAUSS, on, table(name), times, change)
    torch.testing.assert_close(means[-1], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariances[-1], covariance, rtol=1e-9, atol=1e-9)


def test_the_planted_extra_noise_is_seen(monkeypatch):
    honest = mixture.coefficients
    monkeypatch.setattr(mixture, "coefficients", lambda *a: replace(honest(*a), noise=1.1 * honest(*a).noise))
    times = grid.uniform(6, Linear())
    _, covariance = moments_by_running(Linear(), "ddpm", times)
    assert float((chain_moments(GAUSS, Linear(), table("ddpm"), times, change)[1][-1] - covariance).abs().max()) > 0.01


def test_many_steps_without_a_change_give_the_data():
    times = grid.uniform(1000, Linear())
    means, covariances = chain_moments(GAUSS, Linear(), table("ddpm"), times)
    few = chain_moments(GAUSS, Linear(), table("ddpm"), grid.uniform(500, Linear()))[1][-1]
    torch.testing.assert_close(means[-1], GAUSS.means[0], rtol=1e-9, atol=1e-9)
    gap, wider = (float((found - GAUSS.covariances[0]).abs().max()) for found in (covariances[-1], few))
    assert gap == pytest.approx(0.5 * wider, rel=0.05)  # order one


def test_gradients_of_the_expected_reward_go_through_the_moments():
    reward, times = Quadratic(TARGET, 0.8), grid.uniform(5, Linear())

    def expected(matrix: Tensor, shift: Tensor) -> Tensor:
        means, covariances = chain_moments(GAUSS, Linear(), table("sde-flow"), times, lambda t: (matrix, shift))
        return reward.value(means[-1]) - 0.5 * reward.strength * covariances[-1].trace()

    start = (torch.full((2, 2), 0.1, dtype=torch.float64), torch.full((2,), -0.1, dtype=torch.float64))
    assert torch.autograd.gradcheck(expected, tuple(value.requires_grad_() for value in start))


def optimised(solver: Table, steps: int, reward: Quadratic, beta: float) -> float:
    """The mean of the samples once the affine changes of all random steps maximise E[r] - beta KL of the whole path."""
    gauss = Mixture(torch.ones(1), torch.tensor([[0.5]]), torch.tensor([[[0.8]]]))
    times = grid.uniform(steps, Linear())
    rows = [coefficients(Linear(), solver, (time,), target) for time, target in itertools.pairwise(times)]
    random = [place for place, row in enumerate(rows) if row.noise > 0]
    slopes, shifts = (torch.zeros(steps, *shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 1), (1,)))
    keep = torch.tensor([float(place in random) for place in range(steps)]).double()

    def change(t: float) -> tuple[Tensor, Tensor]:
        place = times.index(t)
        return keep[place] * slopes[place], keep[place] * shifts[place]

    def value() -> tuple[Tensor, Tensor]:
        means, covariances = chain_moments(gauss, Linear(), solver, times, change)
        kl = torch.zeros((), dtype=torch.float64)
        for place in random:
            weight = rows[place].weights[0] * (1.0 if rows[place].predicts == "velocity" else times[place])
            mean, spread = slopes[place] @ means[place] + shifts[place], slopes[place] ** 2 * covariances[place]
            kl = kl + weight**2 * (mean**2 + spread).sum() / (2 * rows[place].noise ** 2)
        return reward.value(means[-1]) - 0.5 * reward.strength * covariances[-1].trace() - beta * kl, means[-1]

    search = torch.optim.LBFGS([slopes, shifts], max_iter=300, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -value()[0]
        loss.backward()
        return loss

    search.step(closure)
    return float(value()[1].detach())


def test_a_chain_that_forgets_its_noise_is_tilted_by_the_best_control_and_one_that_remembers_is_not():
    """The KL of paths has the tilt as its optimum only where x_0 does not depend on x_1 (Domingo-Enrich et al. 2024,
    arXiv 2409.08861): of ancestral noise the gap falls as 1 / n, of a constant diffusion of 0.7 it stays."""
    reward, beta = Quadratic(torch.tensor([2.0])), 0.5
    start = Mixture(torch.ones(1), torch.tensor([[0.5]]), torch.tensor([[[0.8]]]))
    tilt = float(reward.optimum(start, beta).distribution.mean)
    gaps = {
        name: [abs(optimised(table(name).replace(level=level), steps, reward, beta) - tilt) for steps in (8, 16)]
        for name, level in (("ddpm", 1.0), ("sde-dance", 0.7))
    }
    assert math.log2(gaps["ddpm"][0] / gaps["ddpm"][1]) == pytest.approx(1.0, abs=0.2)
    assert gaps["sde-dance"][1] > 0.8 * gaps["sde-dance"][0]


@pytest.mark.parametrize("name", PATHS)
def test_the_flow_map_is_the_limit_of_the_ode(name: str):
    on, gaps = on_path(name), []
    matrix, shift = flow_map(GAUSS, on, 0.8, 0.1)
    for steps in (20, 40):
        first, last = on.log_snr(0.8), on.log_snr(0.1)
        times = [on.time(first + (last - first) * place / steps) for place in range(steps + 1)]
        predict = lambda x, t: GAUSS.predict(x, t, on, "data")  # noqa: E731
        found = sample(predict, X, on, times, table("dpmpp-2m-heun"), Rng(0), output="data", partial=True).final
        gaps.append(float((found - X @ matrix.mT - shift).abs().max()))
    assert gaps[0] < 0.1
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(2.0, abs=0.4)


def test_the_flow_map_carries_marginals_to_marginals_and_composes():
    matrix, shift = flow_map(GAUSS, Linear(), 1.0, 0.0)
    before, after = (GAUSS.marginal(Linear(), t) for t in (1.0, 0.0))
    torch.testing.assert_close(matrix @ before.covariances[0] @ matrix.mT, after.covariances[0])
    torch.testing.assert_close(matrix @ before.means[0] + shift, after.means[0])
    (first, b), (second, c) = flow_map(GAUSS, Linear(), 1.0, 0.5), flow_map(GAUSS, Linear(), 0.5, 0.0)
    torch.testing.assert_close(second @ first, matrix)
    torch.testing.assert_close(second @ b + c, shift)


# what is wrong


ONE = torch.ones(1)
BAD: list[tuple[str, Callable[[], object]]] = [
    ("shapes must be", lambda: Mixture(ONE, torch.zeros(2), torch.eye(2))),
    ("as many as its means, 1, got 2", lambda: Mixture(torch.ones(2) / 2, torch.zeros(1, 2), torch.eye(2)[None])),
    ("add up to 1", lambda: Mixture(0.5 * ONE, torch.zeros(1, 2), torch.eye(2)[None])),
    ("finite", lambda: Mixture(ONE, torch.full((1, 2), math.nan), torch.eye(2)[None])),
    ("symmetric", lambda: Mixture(ONE, torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]))),
    ("positive definite", lambda: Mixture(ONE, torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))),
    ("must be .N, 2., states of this mixture", lambda: DATA.predict(torch.zeros(3, 1), 0.5, Linear())),
    ("one time a state", lambda: DATA.predict(X, torch.ones(2), Linear())),
    ("t must be above 0", lambda: DATA.posterior(X[0], Linear(), 0.0)),
    ("must be .2,. and .2, 2., got .1,. and", lambda: DATA.tilted(torch.zeros(1), torch.eye(2))),
    ("above 0", lambda: Quadratic(TARGET).optimum(DATA, 0.0)),
    ("3 components", lambda: flow_map(DATA, Linear(), 1.0, 0.0)),
    ("several predictions", lambda: chain_moments(GAUSS, Linear(), table("heun"), (1.0, 0.0))),
    ("samples must be .n, 2., got .3, 1.", lambda: sliced_wasserstein(torch.zeros(3, 1), DATA)),
    (
        "1 or 2 dimensions",
        lambda: sliced_wasserstein(torch.zeros(3, 3), Mixture(ONE, torch.zeros(1, 3), torch.eye(3)[None])),
    ),
]


@pytest.mark.parametrize(("said", "wrong"), BAD, ids=[said for said, _ in BAD])
def test_wrong_input_is_refused_in_one_sentence(said: str, wrong: Callable[[], object]):
    with pytest.raises(InputError, match=said):
        wrong()


def test_an_unknown_prediction_is_named():
    with pytest.raises(UnknownName, match="velocity"):
        DATA.predict(X, 0.5, Linear(), "velocty")
