"""The models of the digits task: a small flow taught on noisy labels, and two judges that share neither kind nor data.

The 1797 digits are cut once and for all into three parts. The flow and the first judge, who gives the reward, learn
from the first part; the second judge knows the second; samples are compared with the third, and nothing learns from it.
Every weight comes of a seed, and trained weights are cached as safetensors.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from stepwell.errors import MissingAbility
from stepwell.rng import Rng
from stepwell.tasks.cache import cached_folder
from stepwell.tasks.digits.teaching import CLASSES, NO_LABEL, SHAPE, Teaching
from stepwell.tasks.warm_start import threads

PARTS = {"flow": 797, "judge": 500, "held out": 500}
"""The number of digits in each part."""
FREQUENCIES = 16


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingAbility("The digits come with scikit-learn; pip install scikit-learn.") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16.0
    return images, torch.from_numpy(data.target).long()


def digits(part: str) -> tuple[Tensor, Tensor]:
    """The images (N, 1, 8, 8) in [0, 1] and classes (N,) of one of the `PARTS`, which share no digit.

    Source: the test set of Alpaydin and Kaynak's optical recognition of handwritten digits, as in scikit-learn.
    """
    images, classes = _digits()
    order = Rng(0).split("parts").permutation(len(images))
    chosen = dict(zip(PARTS, order.split(list(PARTS.values())), strict=True))[part]
    return images[chosen], classes[chosen]


def encoded(images: Tensor) -> Tensor:
    """Images in [0, 1] as the flow's states in [-1, 1]."""
    return 2.0 * images - 1.0


def decoded(states: Tensor) -> Tensor:
    """The flow's states as images in [0, 1]; values beyond black and white are clipped."""
    return (0.5 * states + 0.5).clamp(0.0, 1.0)


def noisy(labels: Tensor, noise: float, rng: Rng) -> Tensor:
    """The labels (N,), each replaced with probability `noise` by one of the ten at random, which may be the right one.

    So a label is right with probability 1 - 0.9 `noise`, and the labels of balanced classes stay balanced.

    Example:
        >>> noisy(torch.arange(10), 0.0, Rng(0)).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    replaced = rng.bernoulli(torch.full(labels.shape, noise))
    return torch.where(replaced, (rng.uniform(*labels.shape) * CLASSES).long(), labels)


class VelocityNetwork(nn.Module):
    """v(x, t, label): a residual network whose blocks are scaled and shifted by the time and the label."""

    frequencies: Tensor

    def __init__(self, teaching: Teaching):
        super().__init__()
        width, blocks, size = teaching.width, teaching.blocks, math.prod(SHAPE)
        linear = lambda inputs, outputs: nn.utils.skip_init(nn.Linear, inputs, outputs)  # noqa: E731
        self.first, self.last = linear(size, width), linear(width, size)
        self.time = linear(2 * FREQUENCIES, teaching.embedding)
        self.label = nn.utils.skip_init(nn.Embedding, CLASSES + 1, teaching.embedding)
        self.modulation = linear(teaching.embedding, 2 * blocks * width)
        self.into = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.back = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.register_buffer("frequencies", 0.5 * math.pi * torch.arange(1, FREQUENCIES + 1), persistent=False)
        _draw_weights(self, Rng(teaching.seed).split("flow's weights"))
        for layer in (self.last, self.modulation, *self.back):  # it begins as zero, whatever the label
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """x (N, 1, 8, 8), time (N,) in [0, 1], label (N,) up to `NO_LABEL` -> (N, 1, 8, 8)."""
        angles = time[:, None] * self.frequencies
        condition = silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label))
        modulation = self.modulation(condition).chunk(2 * len(self.into), 1)
        hidden = self.first(x.flatten(1))
        for place, (into, back) in enumerate(zip(self.into, self.back, strict=True)):
            scale, shift = modulation[2 * place : 2 * place + 2]
            hidden = hidden + back(silu(into(self.norm(hidden) * (1.0 + scale) + shift)))
        return self.last(self.norm(hidden)).reshape(x.shape)


def _draw_weights(network: nn.Module, rng: Rng) -> None:
    """Draw weights of variance 1 / inputs from `rng`, and set biases to zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(rng.normal(*parameter.shape) / parameter[0].numel() ** 0.5)
            else:
                parameter.zero_()


def taught(teaching: Teaching) -> VelocityNetwork:
    """A network taught by flow matching: min E|v(x_t, t, c) - (e - x_0)|^2 with x_t = (1 - t) x_0 + t e, t uniform.

    Source: Lipman et al. 2023, arXiv 2210.02747, on the straight path. About ten seconds on one core.
    """
    images, classes = digits("flow")
    states, network = encoded(images), VelocityNetwork(teaching)
    rng = Rng(teaching.seed).split("flow's lessons")

    def loss() -> Tensor:
        rows = (rng.uniform(teaching.batch) * len(states)).long()
        label = noisy(classes[rows], teaching.noise, rng)
        label = label.masked_fill(rng.bernoulli(torch.full(label.shape, teaching.no_label)), NO_LABEL)
        data, time, noise = states[rows], rng.uniform(teaching.batch), rng.normal(teaching.batch, *SHAPE)
        spread = time.reshape(-1, 1, 1, 1)
        velocity = network((1.0 - spread) * data + spread * noise, time, label)
        return (velocity - (noise - data)).square().mean()

    _fit(network, loss, teaching.steps, teaching.learning_rate, 0.01, "Teaching the digits (once, then cached)")
    return network


def judge_network() -> nn.Module:
    """An untaught judge of images (N, 1, 8, 8) in [0, 1], to logits (N, 10)."""
    sizes = (math.prod(SHAPE), 128, 128, CLASSES)
    first, second, third = (nn.utils.skip_init(nn.Linear, *pair) for pair in itertools.pairwise(sizes))
    network = nn.Sequential(_Encoded(), nn.Flatten(), first, nn.SiLU(), second, nn.SiLU(), third)
    _draw_weights(network, Rng(0).split("judge's weights"))
    return network


class _Encoded(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return encoded(images)


def taught_judge(steps: int = 600, batch: int = 64, jitter: float = 0.1) -> nn.Module:
    """A judge taught the right classes of the part "flow", with normal noise of deviation `jitter` on the pixels.

    With the noise its opinion does not change abruptly. Half a second on one core.
    """
    images, classes = digits("flow")
    network = judge_network()
    rng = Rng(0).split("judge's lessons")

    def loss() -> Tensor:
        rows = (rng.uniform(batch) * len(images)).long()
        return cross_entropy(network(images[rows] + jitter * rng.normal(batch, *SHAPE)), classes[rows])

    _fit(network, loss, steps, 3e-3, 0.05, "Teaching the judge (once, then cached)")
    return network


def _fit(
    network: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float, decay: float, title: str
) -> None:
    """Train with AdamW, after a warm-up of 50 steps, on one core: for networks this small it is as fast as two."""
    from rich.console import Console
    from rich.progress import track

    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=decay)
    screen = Console(stderr=True)
    bar = track(range(steps), title, console=screen, transient=True, disable=not screen.is_terminal)
    with threads(1), torch.enable_grad():
        for step in bar:
            rate = min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = learning_rate * rate
            optimiser.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()


def digits_network(teaching: Teaching) -> VelocityNetwork:
    """A taught network, a new copy every time; taught now or read from the cache."""
    folder = _cached("digits", {"teaching": asdict(teaching)}, lambda: {"flow": taught(teaching)})
    network = VelocityNetwork(teaching)
    _load(network, folder / "flow.safetensors")
    return network


@lru_cache(maxsize=1)
def judge() -> nn.Module:
    """The taught judge of images (N, 1, 8, 8), to logits (N, 10), that gives the reward."""
    folder = _cached("digits-judge", {}, lambda: {"judge": taught_judge()})
    network = judge_network()
    _load(network, folder / "judge.safetensors")
    return network.eval().requires_grad_(False)


def read(images: Tensor) -> Tensor:
    """The probability that the first judge gives to each class, (N, 10), of images (N, 1, 8, 8); differentiable."""
    return judge().to(images.device)(images.float()).softmax(1)


def most_alike(images: Tensor) -> Tensor:
    """The second judge's class (N,) of images (N, 1, 8, 8): that of the nearest digit of the part "judge".

    It is right about real digits as often as the first judge, and it has no gradient to follow.
    """
    examples, classes = digits("judge")
    return classes[distances(images, examples).argmin(1)]


def distances(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) Euclidean distances; not by matrix products, whose rounding puts identical images apart."""
    return torch.cdist(first.flatten(1), second.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def _cached(name: str, key: dict[str, object], make: Callable[[], dict[str, nn.Module]]) -> Path:
    """The folder with the weights of the networks that `make` returns, one file each."""
    from safetensors.torch import save_file

    def fill(folder: Path) -> None:
        for network, module in make().items():
            save_file(module.state_dict(), folder / f"{network}.safetensors")

    code = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()
    return cached_folder(name, {**key, "code": code}, fill)


def _load(network: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    network.load_state_dict(load_file(path))
