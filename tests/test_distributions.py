"""Laws of a step: densities, entropies and divergences against torch's own, and draws against densities."""

import math

import pytest
import torch
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal, kl_divergence

from stepwell.check import expectation, law
from stepwell.distributions import Categorical, Distribution, Gaussian, Point
from stepwell.rng import Rng


def logits(seed, rows=4, symbols=5):
    return Rng(seed).normal(rows, symbols, dtype=torch.float64)


def gaussians(seed, *shape):
    rng = Rng(seed)
    mean, deviation = rng.normal(*shape, dtype=torch.float64), rng.uniform(*shape, dtype=torch.float64) + 0.2
    return Gaussian(mean, deviation), Independent(Normal(mean, deviation), len(shape) - 1)


def test_categorical_agrees_with_torch():
    ours, theirs = Categorical(logits(0)), TorchCategorical(logits=logits(0))
    other, other_theirs = Categorical(logits(1)), TorchCategorical(logits=logits(1))
    action = torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.kl(other), kl_divergence(theirs, other_theirs))
    torch.testing.assert_close(ours.probabilities, theirs.probs)


def test_categorical_draws_have_its_probabilities():
    one = Categorical(logits(2, rows=1))
    exact = law(lambda rng: int(one.sample(rng)))
    assert [exact[symbol] for symbol in range(5)] == pytest.approx(one.probabilities[0].tolist(), abs=1e-14)


def test_forbidden_symbols_are_never_drawn_and_count_nothing_even_in_gradients():
    raw = torch.tensor([[0.3, -math.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    masked, free = Categorical(raw), Categorical(torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64))
    two = Categorical(raw[:, [0, 2]])
    torch.testing.assert_close(masked.entropy(), two.entropy())
    torch.testing.assert_close(masked.kl(masked), torch.zeros(1, dtype=torch.float64))
    assert float(free.kl(masked).detach()) == math.inf
    assert set(law(lambda rng: int(masked.sample(rng)))) == {0, 2}
    (gradient,) = torch.autograd.grad((masked.entropy() + masked.kl(free)).sum(), raw)
    assert gradient.isfinite().all()


def test_the_kl_divergence_is_that_of_the_first_from_the_second():
    one, two = Categorical(logits(3, 1)), Categorical(logits(4, 1))
    sampled = expectation(lambda rng: (lambda a: one.log_prob(a) - two.log_prob(a))(one.sample(rng)))
    torch.testing.assert_close(one.kl(two), sampled)
    assert not torch.allclose(two.kl(one), sampled)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)])
def test_gaussian_agrees_with_torch_in_any_dimension(shape):
    (ours, theirs), (other, other_theirs) = gaussians(0, *shape), gaussians(1, *shape)
    action = Rng(2).normal(*shape, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.kl(other), kl_divergence(theirs, other_theirs))


def test_a_log_density_is_the_sum_over_dimensions_not_the_mean():
    one = Gaussian(torch.zeros(1, 7), torch.ones(1, 1))
    assert float(one.log_prob(torch.zeros(1, 7))) == pytest.approx(-3.5 * math.log(2 * math.pi))


def test_a_shared_deviation_is_broadcast_in_every_quantity():
    mean = Rng(0).normal(3, 4, dtype=torch.float64)
    shared = Gaussian(mean, torch.tensor(0.7, dtype=torch.float64))
    full = Gaussian(mean, torch.full((3, 4), 0.7, dtype=torch.float64))
    action = mean + 1
    torch.testing.assert_close(shared.log_prob(action), full.log_prob(action))
    torch.testing.assert_close(shared.entropy(), full.entropy())
    torch.testing.assert_close(shared.kl(full), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(shared[torch.tensor([2, 0])].log_prob(action[[2, 0]]), full.log_prob(action)[[2, 0]])


def test_gaussian_draws_have_its_mean_and_variance():
    one = Gaussian(torch.tensor([[1.0, -2.0]], dtype=torch.float64), torch.tensor([[0.5, 3.0]], dtype=torch.float64))
    first, second = expectation(lambda rng: (lambda x: (x, (x - one.mean) ** 2))(one.sample(rng)), normal_nodes=2)
    torch.testing.assert_close(first, one.mean)
    torch.testing.assert_close(second, one.standard_deviation**2)


def test_a_deterministic_step_has_no_density_and_uses_no_randomness():
    point = Point(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert law(lambda rng: point.sample(rng)) == {((1.0, 2.0), (3.0, 4.0)): 1.0}
    for nothing in (point.log_prob(point.value), point.entropy(), point.kl(point)):
        assert nothing.dtype == torch.float64
        assert nothing.tolist() == [0.0, 0.0]
    assert point.random.tolist() == [False, False]


@pytest.mark.parametrize(
    "one",
    [Categorical(logits(5)), gaussians(5, 4, 3)[0], Point(torch.arange(4.0))],
    ids=["categorical", "gaussian", "point"],
)
def test_rows_of_a_distribution_are_the_distribution_of_the_rows(one):
    assert isinstance(one, Distribution)
    index = torch.tensor([3, 0, 0])
    action = one.sample(Rng(0))
    torch.testing.assert_close(one[index].log_prob(action[index]), one.log_prob(action)[index])
    torch.testing.assert_close(one[index].entropy(), one.entropy()[index])
    torch.testing.assert_close(one[index].kl(one[index]), torch.zeros(3, dtype=one.entropy().dtype))
    assert torch.equal(one[index].random, one.random[index])
