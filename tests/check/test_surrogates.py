"""Surrogates are held to their slope at ratio 1, for either sign of the advantage; planted mistakes are caught."""

from dataclasses import dataclass

import pytest
import torch

from stepwell import check, methods
from stepwell.cli import main
from stepwell.errors import InputError, LawBroken
from stepwell.objective.gates.step import SamplerCorrection
from stepwell.objective.surrogate import (
    BySource,
    Clip,
    Drift,
    Focused,
    GammaScore,
    Plain,
    Score,
    Shaped,
    SignedScore,
    Surrogate,
    Taper,
)

HONEST = [
    *(Clip(), Clip(0.0, 0.0), Clip(0.1, 0.3, dual=3.0, delta=1.5), Plain(), Score(), Score(0.5, 2.0), Taper(), Drift()),
    *(SignedScore(), SignedScore((0.0, 5.0), (0.0, 1.0)), GammaScore(), GammaScore(sampler=SamplerCorrection())),
    *(Focused(), Focused(2.0), Shaped(), BySource(Clip(), Shaped(0.3)), 0.5 * Clip() + 0.5 * Plain(), 3 * Score()),
]


@pytest.mark.parametrize("part", HONEST, ids=str)
def test_every_surrogate_has_the_slope_it_declares(part):
    assert check.surrogate(part) < 1e-12


def test_only_three_surrogates_declare_another_slope():
    """Focused and Shaped, for rows whose distribution nobody knows, and sums whose weights are not 1."""

    class Batch:
        log_prob = torch.tensor([[-0.5, -2.0]], dtype=torch.float64)

    others = [part for part in HONEST if not isinstance(part, BySource) and bool((part.slope(Batch()) != 1).any())]
    assert others == [Focused(), Focused(2.0), Shaped(), 3 * Score()]


@dataclass(frozen=True)
class WrongSign(Plain):
    """The loss falls where the advantage is negative."""

    def __call__(self, log_ratio, advantage, batch):
        return -super().__call__(log_ratio, advantage, batch)


@dataclass(frozen=True)
class OneSided(Plain):
    """Rows with a negative advantage teach nothing."""

    def __call__(self, log_ratio, advantage, batch):
        return super().__call__(log_ratio, advantage.clamp(min=0.0), batch)


@dataclass(frozen=True)
class Twice(Plain):
    """A factor that no slope declares."""

    def __call__(self, log_ratio, advantage, batch):
        return 2 * super().__call__(log_ratio, advantage, batch)


@dataclass(frozen=True)
class Undeclared(Shaped):
    """A slope other than the policy gradient's, which is declared as if it were that."""

    def slope(self, batch):
        return torch.ones_like(batch.log_prob)


@dataclass(frozen=True)
class Infinite(Plain):
    """A loss that divides by log r."""

    def __call__(self, log_ratio, advantage, batch):
        return super().__call__(log_ratio, advantage, batch) / log_ratio


@dataclass(frozen=True)
class Constant(Plain):
    """A loss without a gradient."""

    def __call__(self, log_ratio, advantage, batch):
        return super().__call__(log_ratio, advantage, batch).detach()


@dataclass(frozen=True)
class OfRows(Plain):
    """A loss a row."""

    def __call__(self, log_ratio, advantage, batch):
        return super().__call__(log_ratio, advantage, batch).sum(1)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (WrongSign(), "at ratio 1 and an advantage above 0 the slope of WrongSign is"),
        (OneSided(), "an advantage below 0 the slope of OneSided is -?0, where"),
        (Twice(), "the slope of Twice is"),
        (Undeclared(), "the slope of Undeclared is"),
        (Infinite(), "the loss of Infinite is not one finite number a step"),
        (Constant(), "the slope of Constant is 0, where"),
        (OfRows(), "the loss of OfRows is not one finite number a step"),
        (Clip() - 0.5 * Plain() - 0.5 * WrongSign(), None),
    ],
    ids=str,
)
def test_a_planted_mistake_is_caught(mistake, words):
    if words is None:  # declared slopes add up, and so do mistakes
        words = "the slope of WeightedSum is"
    with pytest.raises(LawBroken, match=f"^The law 'surrogate' is broken: .*{words}"):
        check.surrogate(mistake)


def test_what_is_no_surrogate_is_refused():
    with pytest.raises(InputError, match="part must be a Surrogate, such as Clip"):
        check.surrogate("clip")
    assert issubclass(Clip, Surrogate)


PLUGIN = """
from dataclasses import dataclass
from stepwell import Recipe, method
from stepwell.objective.policy import Policy
from stepwell.objective.surrogate import Plain

@dataclass(frozen=True)
class Upwards(Plain):
    def __call__(self, log_ratio, advantage, batch):
        return {sign}super().__call__(log_ratio, advantage, batch)

@method("{name}", title="A method of one's own")
def build():
    return Recipe(Policy(surrogate=Upwards()))
"""


@pytest.fixture
def plugins():
    """The methods that the plugins register are gone afterwards."""
    yield
    for name in ("upwards", "downwards"):
        methods.forget(name)


@pytest.mark.usefixtures("plugins")
def test_a_users_surrogate_of_the_wrong_sign_is_caught_by_the_command(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(sign="-", name="upwards"))
    assert main(["check", "upwards", "--plugin", str(file)]) == 2
    shown = capsys.readouterr().err
    assert "In the method 'upwards': The law 'surrogate' is broken" in shown
    assert "the slope of Upwards is" in shown
    right = tmp_path / "right.py"
    right.write_text(PLUGIN.format(sign="", name="downwards"))
    assert main(["check", "downwards", "--plugin", str(right)]) == 0
    assert "surrogate" in capsys.readouterr().out
