"""The one door of randomness: `Rng` draws, and its twin `Replay` walks through every outcome.

A program written against these methods can be run for real with an `Rng`, or enumerated exactly with
`stepwell.check.law`, which runs it once for every outcome of its random choices.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

from stepwell.errors import InputError, Unenumerable
from stepwell.ranges import Demand, Range
from stepwell.tensors import Tensor, functional, torch

BLOCK = 256
"""Symbols that are summed up at once, where one is drawn from many."""


class Rng:
    """A stream of random numbers, owned by the caller.

    Draws are made on the stream's device; where probabilities are given, the draw is on their device.

    Example:
        >>> rng = Rng(0)
        >>> rng.categorical(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()
        [1, 0]
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu"):
        Demand(range=Range("a whole number", whole=True)).refuse("Rng.seed", seed)
        self.seed = int(seed)
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    def categorical(self, probabilities: Tensor) -> Tensor:
        """One index a row, (N,), from unnormalised probabilities (N, K): one uniform a row, through its inverse CDF.

        Blocks of symbols are summed in the dtype of the probabilities, at least float32, and all else in double
        precision, so that no symbol is lost beside many; one of probability 0 is never drawn.

        Raises `InputError` for a row whose probabilities are not numbers from 0 with a sum above it.
        """
        rows, symbols = probabilities.shape
        values = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
        if symbols % BLOCK and symbols > BLOCK:
            values = functional.pad(values, (0, -symbols % BLOCK))
        blocks = values.unflatten(1, (-1, min(symbols, BLOCK)))
        sums = blocks.sum(-1).double().cumsum(-1)  # (N, B) first which block, then where in it
        total = sums[:, -1:]
        if not bool(((total > 0) & total.isfinite()).all() & (values.amin(-1) >= 0).all()):
            raise InputError("The probabilities of each row must be numbers of at least 0 with a sum above 0.")
        point = self.uniform(rows, 1, dtype=torch.float64).to(total.device) * total
        block = _first_above(sums, point)
        rest = point - functional.pad(sums, (1, 0)).gather(1, block)
        inside = blocks[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
        return (block * BLOCK + _first_above(inside, rest))[:, 0]

    def bernoulli(self, probability: Tensor) -> Tensor:
        """True with the given probability, elementwise; a bool tensor of the same shape."""
        return torch.bernoulli(probability.to(self.device), generator=self._generator).bool().to(probability.device)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """Uniforms in [0, 1) of the given shape.

        A program that only compares them with thresholds, after multiplying by or adding constants, can be
        enumerated; hence the return type is whatever supports those operations.
        """
        return torch.rand(shape, generator=self._generator, dtype=dtype, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normals of the given shape."""
        return torch.randn(shape, generator=self._generator, dtype=dtype, device=self.device)

    def gumbel(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard Gumbel variables of the given shape."""
        exponential = torch.empty(shape, dtype=dtype, device=self.device).exponential_(generator=self._generator)
        return -exponential.log()

    def without_replacement(self, log_weights: Tensor, count: int) -> Tensor:
        """`count` different indices a row, (N, count), in the order drawn (Gumbel top-k; Kool et al. 2019).

        `log_weights` is (N, K), unnormalised, minus infinity for what may not be drawn. They are distributed as
        sequential draws without replacement. Raises `InputError` where fewer than `count` can be drawn.
        """
        _enough(log_weights, count)
        noise = self.gumbel(*log_weights.shape, dtype=log_weights.dtype).to(log_weights.device)
        return (log_weights + noise).topk(count, dim=-1).indices

    def permutation(self, count: int) -> Tensor:
        """A uniformly random order of 0..count-1, (count,)."""
        return torch.randperm(count, generator=self._generator, device=self.device)

    def split(self, *name: object) -> Rng:
        """An independent stream for `name`, the same however much this one has been used."""
        digest = hashlib.blake2b(repr((self.seed, *name)).encode(), digest_size=8).digest()
        return Rng(int.from_bytes(digest, "little") >> 1, self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = int(state["seed"])
        self._generator.set_state(state["generator"])


def _enough(log_weights: Tensor, count: int) -> None:
    """Refuse draws without replacement that would have to repeat an index or take an impossible one."""
    possible = int((log_weights > -math.inf).sum(-1).min()) if len(log_weights) else count
    if count > possible:
        raise InputError(f"count must be at most {possible}, the indices of positive weight in a row, got {count}.")


LONGEST = 10_000
"""The most choices that one run of a `Replay` may make."""


def _first_above(rising: Tensor, point: Tensor) -> Tensor:
    """(N, 1) the first place of each rising row (N, K) that is above the point (N, 1), or where rounding has put the
    point beyond all of them, the first that is as high as the last."""
    last = rising[:, -1:]
    return torch.searchsorted(rising, torch.minimum(point, torch.nextafter(last, -torch.ones_like(last))), right=True)


class Replay(Rng):
    """The exhaustive twin of `Rng`: its draws follow a script of choices, and it knows their probability.

    `stepwell.check.law` runs a program with one `Replay` after another, depth first, until every outcome was
    seen. It can enumerate `categorical`, `bernoulli`, `permutation`, `without_replacement`; `uniform`, when
    the program only compares it with thresholds (after multiplying by or adding constants); `normal`, replaced
    by the nodes of Gauss-Hermite quadrature, exact for polynomials of degree below 2 `normal_nodes`. Raw
    `gumbel` noise and any other use of a uniform raise `Unenumerable`; so does splitting off two streams of one name,
    since a real `Rng` would repeat the draws of the first in the second.
    """

    def __init__(self, script: Sequence[int] = (), normal_nodes: int | None = None):
        self.script = list(script)
        self.normal_nodes = normal_nodes
        self.factors: list[float] = []
        self.choices: list[int] = []
        self.branches: list[int] = []
        self._names: set[str] = set()  # shared, as are the lists above, by all streams split off
        self._path: tuple[object, ...] = ()
        self.seed, self.device = 0, torch.device("cpu")

    @property
    def probability(self) -> float:
        """The probability of the choices made so far."""
        return math.prod(self.factors)

    def choose(self, probabilities: Sequence[float]) -> int:
        """One of the outcomes of positive probability: the script's, else the first."""
        live = [index for index, value in enumerate(probabilities) if value > 0.0]
        if not live or not all(math.isfinite(value) and value >= 0.0 for value in probabilities):
            raise Unenumerable(
                f"The probabilities of a choice must be finite and at least 0, one of them above, got "
                f"{list(probabilities)}."
            )
        position = len(self.choices)
        if position >= LONGEST:
            raise Unenumerable(f"The program made {LONGEST} choices in one run; it may go on for ever.")
        choice = self.script[position] if position < len(self.script) else 0
        if choice >= len(live):
            raise Unenumerable(
                "The program met other choices when it was run again; it keeps state between runs or has a second "
                "source of randomness."
            )
        self.choices.append(choice)
        self.branches.append(len(live))
        self.factors.append(probabilities[live[choice]] / math.fsum(probabilities))
        return live[choice]

    def categorical(self, probabilities: Tensor) -> Tensor:
        rows = probabilities.detach().double().tolist()
        return torch.tensor([self.choose(row) for row in rows], dtype=torch.long, device=probabilities.device)

    def bernoulli(self, probability: Tensor) -> Tensor:
        flat = probability.detach().double().reshape(-1).tolist()
        drawn = [self.choose([1.0 - value, value]) == 1 for value in flat]
        return torch.tensor(drawn, dtype=torch.bool, device=probability.device).reshape(probability.shape)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        intervals = [[0.0, 1.0] for _ in range(math.prod(shape))]
        return ThresholdUniform(self, intervals, torch.arange(len(intervals)).reshape(shape), 1.0, 0.0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.normal_nodes is None:
            raise Unenumerable(
                "A normal draw has no finite list of outcomes; pass normal_nodes=n to use Gauss-Hermite nodes."
            )
        import numpy as np

        nodes, weights = np.polynomial.hermite_e.hermegauss(self.normal_nodes)
        drawn = [float(nodes[self.choose(weights.tolist())]) for _ in range(math.prod(shape))]
        return torch.tensor(drawn, dtype=dtype or torch.float64).reshape(shape)

    def gumbel(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        raise Unenumerable("Raw Gumbel noise cannot be enumerated; draw with `without_replacement` instead.")

    def without_replacement(self, log_weights: Tensor, count: int) -> Tensor:
        _enough(log_weights, count)
        rows = []
        for row in log_weights.detach().double().clone():
            drawn: list[int] = []
            for _ in range(count):  # normalised anew: the rest may underflow by the old sum
                drawn.append(self.choose(row.softmax(-1).tolist()))
                row[drawn[-1]] = -math.inf
            rows.append(drawn)
        return torch.tensor(rows, dtype=torch.long, device=log_weights.device).reshape(len(rows), count)

    def permutation(self, count: int) -> Tensor:
        return self.without_replacement(torch.zeros(1, count), count)[0]

    def split(self, *name: object) -> Self:
        twin = copy.copy(self)
        twin._path = (*self._path, name)
        if repr(twin._path) in self._names:
            raise Unenumerable(f"Two streams were split off as {name}; in a real run the second repeats the first.")
        self._names.add(repr(twin._path))
        return twin

    def state_dict(self) -> dict[str, Any]:
        raise Unenumerable("A replay has no state to save: it is a walk over outcomes, not a stream.")

    def next_script(self) -> list[int] | None:
        """The script of the next outcome in depth-first order, or None after the last."""
        for position in range(len(self.choices) - 1, -1, -1):
            if self.choices[position] + 1 < self.branches[position]:
                return [*self.choices[:position], self.choices[position] + 1]
        return None


class ThresholdUniform:
    """Uniforms that are known by comparisons only: each one splits their interval at its threshold.

    Elements of one draw may be viewed several times (indexed, scaled, shifted); all views share the knowledge
    gathered so far, so that later comparisons agree with earlier ones.
    """

    def __init__(self, replay: Replay, intervals: list[list[float]], index: Tensor, scale: Any, shift: Any):
        self._replay, self._intervals, self._index = replay, intervals, index
        self._scale = torch.as_tensor(scale, dtype=torch.float64).expand(index.shape)
        self._shift = torch.as_tensor(shift, dtype=torch.float64).expand(index.shape)

    @property
    def shape(self) -> torch.Size:
        return self._index.shape

    def __len__(self) -> int:
        return len(self._index)

    def _constant(self, value: Any) -> Tensor:
        if isinstance(value, ThresholdUniform):
            raise Unenumerable("A uniform can be enumerated only against constants, not against another uniform.")
        return torch.as_tensor(value, dtype=torch.float64)

    def _affine(self, scale: Any, shift: Any) -> ThresholdUniform:
        scale, shift = self._constant(scale), self._constant(shift)
        shape = torch.broadcast_shapes(self.shape, scale.shape, shift.shape)
        return ThresholdUniform(
            self._replay, self._intervals, self._index.expand(shape), self._scale * scale, self._shift * scale + shift
        )

    def __add__(self, other: Any) -> ThresholdUniform:
        return self._affine(1.0, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> ThresholdUniform:
        return self._affine(1.0, -self._constant(other))

    def __rsub__(self, other: Any) -> ThresholdUniform:
        return self._affine(-1.0, other)

    def __mul__(self, other: Any) -> ThresholdUniform:
        return self._affine(other, 0.0)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> ThresholdUniform:
        return self._affine(1.0 / self._constant(other), 0.0)

    def __getitem__(self, key: Any) -> ThresholdUniform:
        return ThresholdUniform(self._replay, self._intervals, self._index[key], self._scale[key], self._shift[key])

    def _below(self, threshold: Any, sign: int, inclusive: bool = False) -> Tensor:
        """sign * (scale u + shift - threshold) < 0, deciding what is not known yet; `inclusive`: <= 0."""
        threshold = self._constant(threshold)
        shape = torch.broadcast_shapes(self.shape, threshold.shape)
        columns = (self._index, self._scale, self._shift, threshold)
        flat = [column.expand(shape).reshape(-1).tolist() for column in columns]
        decided = [self._decide(i, a, b, t, sign, inclusive) for i, a, b, t in zip(*flat, strict=True)]
        return torch.tensor(decided, dtype=torch.bool).reshape(shape)

    def _decide(self, index: int, scale: float, shift: float, threshold: float, sign: int, inclusive: bool) -> bool:
        if scale == 0.0:
            return sign * (shift - threshold) < 0 or (inclusive and shift == threshold)
        point, low_side = (threshold - shift) / scale, sign * scale > 0  # below the point <=> the comparison holds
        low, high = self._intervals[index]
        if point <= low or point >= high:
            below = point >= high
        else:
            below = self._replay.choose([(point - low) / (high - low), (high - point) / (high - low)]) == 0
            self._intervals[index] = [low, point] if below else [point, high]
        return below == low_side

    def __lt__(self, threshold: Any) -> Tensor:
        return self._below(threshold, 1)

    def __le__(self, threshold: Any) -> Tensor:
        return self._below(threshold, 1, inclusive=True)

    def __gt__(self, threshold: Any) -> Tensor:
        return self._below(threshold, -1)

    def __ge__(self, threshold: Any) -> Tensor:
        return self._below(threshold, -1, inclusive=True)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Unenumerable("A uniform can be enumerated only if it is compared with thresholds, nothing else.")

    __array__ = __float__ = __int__ = __index__ = __bool__ = __neg__ = __abs__ = __round__ = __eq__ = __ne__ = _refuse
    __pow__ = __rpow__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __rtruediv__ = __contains__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # an absent protocol must be an AttributeError
            raise AttributeError(name)
        raise Unenumerable(f"A uniform can be enumerated only if it is compared with thresholds; .{name} is not.")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        """Tensors on the left of a comparison or an arithmetic sign end here; all else is refused."""
        name = getattr(function, "__name__", "")
        swapped = {"__lt__": "__gt__", "lt": "__gt__", "__le__": "__ge__", "le": "__ge__", "__gt__": "__lt__"}
        swapped |= {"gt": "__lt__", "__ge__": "__le__", "ge": "__le__", "add": "__radd__", "__add__": "__radd__"}
        swapped |= {"sub": "__rsub__", "__sub__": "__rsub__", "mul": "__rmul__", "__mul__": "__rmul__"}
        if len(arguments) == 2 and name in swapped and isinstance(arguments[1], cls):
            return getattr(arguments[1], swapped[name])(arguments[0])
        raise Unenumerable(f"A uniform can be enumerated only if it is compared with thresholds; torch.{name} is not.")
