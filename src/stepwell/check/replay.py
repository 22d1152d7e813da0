"""Exact laws of random programs: run them once for every outcome of their choices, and add up.

A program is a function of an `Rng`. It can be enumerated if it is a function of nothing else (no global generator, no
state kept between runs) and draws by

- `categorical`, `bernoulli`, `permutation`, `without_replacement`;
- `uniform`, compared with thresholds, if need be after multiplying by or adding constants: each comparison splits the
  interval at its threshold (systematic resampling, thinning, accept or reject);
- `normal`, where `normal_nodes=n` replaces it by n Gauss-Hermite nodes: exact for expectations of polynomials of
  degree below 2n in each normal, and an approximation for all else.

Raw Gumbel noise, any other use of a uniform (its value, its logarithm, `searchsorted`) and loops that may go on for
ever cannot be enumerated, and say so by `Unenumerable`. The number of outcomes is the product of all choices, so that
programs have to be small: 10^4 outcomes take a second or so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stepwell.errors import InputError, LawBroken, Unenumerable
from stepwell.process.base import Samples
from stepwell.process.exact.table import TabularLanguage
from stepwell.rng import Replay, Rng
from stepwell.sampling.record import Drawn
from stepwell.trajectories import Trajectories

Result = TypeVar("Result")
Text = tuple[int, ...]


def outcomes(
    program: Callable[[Rng], Result], *, normal_nodes: int | None = None, limit: int = 200_000
) -> Iterator[tuple[float, Result]]:
    """Every outcome of a program with its probability, depth first; equal results are not merged.

    Raises `Unenumerable` after `limit` runs, or where the program uses randomness in a way that has no finite list of
    outcomes.

    Example:
        >>> for probability, heads in outcomes(lambda rng: int(rng.bernoulli(torch.tensor([0.5, 0.5])).sum())):
        ...     print(probability, heads)
        0.25 0
        0.25 1
        0.25 1
        0.25 2
    """
    script: list[int] = []
    for _ in range(limit):
        replay = Replay(script, normal_nodes)
        result = program(replay)
        if len(replay.choices) < len(script):
            raise Unenumerable("The program made fewer choices when it was run again; it keeps state between runs.")
        yield replay.probability, result
        following = replay.next_script()
        if following is None:
            return
        script = following
    raise Unenumerable(f"The program has more than {limit} outcomes; make it smaller, or raise the limit.")


def law(
    program: Callable[[Rng], Any], *, normal_nodes: int | None = None, limit: int = 200_000
) -> dict[Hashable, float]:
    """The exact law of a program's result: outcome -> probability, in the order first met.

    Tensors, arrays and lists become nested tuples; trajectories become, row by row, the tuple of their actions; what
    a rollout drew becomes the tuple of its samples' values. Floating-point results count as equal only if they are
    equal to the last bit; round them. Raises `LawBroken` if the probabilities do not add up to 1 within 1e-12.

    Example:
        >>> law(lambda rng: rng.without_replacement(torch.zeros(1, 3), 2)[0].sort().values)
        {(0, 1): 0.3333333333333333, (0, 2): 0.3333333333333333, (1, 2): 0.3333333333333333}
    """
    parts: defaultdict[Hashable, list[float]] = defaultdict(list)
    for probability, result in outcomes(program, normal_nodes=normal_nodes, limit=limit):
        parts[hashable(result)].append(probability)
    answer = {outcome: math.fsum(part) for outcome, part in parts.items()}
    _adds_up(math.fsum(answer.values()))
    return answer


def hashable(result: Any) -> Hashable:
    """The result as something that can be compared and counted; raises `InputError` where that is impossible."""
    match result:
        case Tensor():
            return hashable(result.tolist())
        case Drawn():
            return hashable(result.samples.values)
        case Samples():
            return hashable(result.values)
        case Trajectories():
            rows = zip(result.action.tolist(), result.length.tolist(), strict=True)
            return hashable([row[:steps] for row, steps in rows])
        case list() | tuple():
            return tuple(hashable(part) for part in result)
        case set() | frozenset():
            return frozenset(hashable(part) for part in result)
        case Mapping():
            return frozenset((key, hashable(value)) for key, value in result.items())
    if callable(getattr(result, "tolist", None)):  # numpy
        return hashable(result.tolist())
    try:
        hash(result)
    except TypeError:
        raise InputError(f"A law counts outcomes; a {type(result).__name__} cannot be compared and counted.") from None
    answer: Hashable = result
    return answer


def expectation(program: Callable[[Rng], Any], *, normal_nodes: int | None = None, limit: int = 200_000) -> Any:
    """The exact expectation of what a program returns: a number, a tensor, or a dict, tuple or list of such.

    The answer has the same structure, in float64; numbers come back as floats. Tensors stay differentiable, with the
    probabilities of the outcomes as constants. Raises `LawBroken` if those do not add up to 1 within 1e-12.

    Example:
        >>> expectation(lambda rng: rng.bernoulli(torch.tensor([0.25, 0.5])))
        tensor([0.2500, 0.5000], dtype=torch.float64)
        >>> expectation(lambda rng: rng.normal(2) ** 4, normal_nodes=3)
        tensor([3., 3.], dtype=torch.float64)
    """
    total: Any = None
    mass: list[float] = []
    for probability, result in outcomes(program, normal_nodes=normal_nodes, limit=limit):
        part = _scaled(probability, result)
        total = part if total is None else _sum(total, part)
        mass.append(probability)
    _adds_up(math.fsum(mass))
    return total


def _adds_up(mass: float) -> None:
    if abs(mass - 1.0) > 1e-12:
        raise LawBroken(
            f"The probabilities of all outcomes add up to {mass!r} instead of 1; the program is no function of its "
            "random choices alone."
        )


def _scaled(factor: float, result: Any) -> Any:
    match result:
        case Tensor():
            return factor * result.double()
        case Mapping():
            return {key: _scaled(factor, value) for key, value in result.items()}
        case list() | tuple():
            return tuple(_scaled(factor, value) for value in result)
        case int() | float():
            return factor * result
    raise InputError(f"An expectation is taken of numbers and tensors; a {type(result).__name__} has none.")


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return {key: _sum(left[key], right[key]) for key in left}
    if isinstance(left, tuple) and isinstance(right, tuple) and len(left) == len(right):
        return tuple(_sum(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, Tensor | float) and isinstance(right, Tensor | float):
        shapes = [tuple(side.shape) if isinstance(side, Tensor) else () for side in (left, right)]
        if shapes[0] == shapes[1]:
            return left + right
    raise InputError("An expectation needs results of one structure; the outcomes differ in keys, length or shape.")


def unbiased(
    program: Callable[..., Any],
    target: Any = None,
    *,
    on: TabularLanguage | None = None,
    prompt: int = 0,
    log_potential: Callable[[Text], float] | None = None,
    test_functions: Mapping[str, Callable[[Text], float]] | None = None,
    tolerance: float = 1e-10,
    normal_nodes: int | None = None,
    limit: int = 200_000,
) -> float:
    """Raise `LawBroken` unless the exact expectation of a program is what it should be; else the largest deviation.

    Of an estimator: `unbiased(program, target)`. `program(rng)` returns a number or tensor (or a dict or tuple of
    such), and `target` is what its expectation has to be, or a function without arguments that says so.

    Of a sampler: `unbiased(sampler, on=process)`. `sampler(process, rng)` returns N strings of the process: a list of
    them, a `Drawn` (with its log weights), or a pair (strings, log weights). It is properly weighted if for every
    string y

        E[ (1/N) sum_i w_i 1{y_i = y} ] = p(y | prompt) exp(log_potential(y)),

    the probability under the process itself where there is no potential. A list has weights w = 1, so there the law of
    the strings has to be that of the process. With `test_functions` (name -> function of the string) only their
    expectations are compared, which is all that is true of samplers that merge strings. With both `on` and
    `target`, `program(process, rng)` is an estimator and `target` a value or a function of the process.

    Example:
        >>> from stepwell.process.exact.table import markov
        >>> from stepwell.sampling.request import Prompt, Request
        >>> from stepwell.sampling.rollout import rollout
        >>> model = markov(symbols=3, length=2)
        >>> def sampler(process, rng):
        ...     return rollout(process, [Request(Prompt(0, 0), count=2)], rng)
        >>> unbiased(sampler, on=model) < 1e-12
        True
        >>> def greedy(process, rng):
        ...     return [process.strings()[process.string_probabilities().argmax()]]
        >>> unbiased(greedy, on=model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        stepwell.errors.LawBroken: The expectation of string ... is ..., where ... is right: it is off by ...
    """
    settings: dict[str, Any] = {"normal_nodes": normal_nodes, "limit": limit}
    if target is not None:
        run = program if on is None else lambda rng: program(on, rng)
        wanted = (target() if on is None else target(on)) if callable(target) else target
        return _compare("the program", expectation(run, **settings), _scaled(1.0, wanted), tolerance)
    if on is None:
        raise InputError("unbiased needs a target value, or a process with on=..., to compare with.")
    texts = on.strings()
    tilt = [1.0 if log_potential is None else math.exp(log_potential(text)) for text in texts]
    exact = on.string_probabilities(prompt).detach() * torch.tensor(tilt, dtype=torch.float64)
    place = {text: row for row, text in enumerate(texts)}

    def measure(rng: Rng) -> Tensor:
        """(strings,) the weighted empirical measure of one run."""
        drawn, weights = _strings(program(on, rng))
        unknown = [text for text in drawn if text not in place]
        if unknown:
            raise LawBroken(f"The sampler returned {unknown[0]}, which is no complete string of the process.")
        rows = torch.tensor([place[text] for text in drawn])
        return torch.zeros(len(texts), dtype=torch.float64).index_add_(0, rows, weights / len(drawn))

    found = expectation(measure, **settings)
    if test_functions is None:
        return max(_compare(f"string {text}", found[row], exact[row], tolerance) for text, row in place.items())
    deviation = 0.0
    for name, function in test_functions.items():
        values = torch.tensor([float(function(text)) for text in texts], dtype=torch.float64)
        deviation = max(deviation, _compare(name, found @ values, exact @ values, tolerance))
    return deviation


def _strings(result: Any) -> tuple[list[Text], Tensor]:
    """The strings a sampler returned, and their weights (N,), float64."""
    if isinstance(result, Drawn):
        strings, log_weights = result.samples.values, result.trajectories.weight
    elif isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Tensor):
        strings, log_weights = result
    else:
        strings, log_weights = result, torch.zeros(len(result))
    if not strings or len(strings) != len(log_weights):
        raise InputError(f"A sampler has to return strings with a weight each, not {len(strings)} strings.")
    texts = [tuple(int(symbol) for symbol in text) for text in strings]
    return texts, log_weights.detach().double().exp()


def _compare(name: str, found: Any, wanted: Any, tolerance: float) -> float:
    """The largest deviation of two equal structures; raises `LawBroken` where it is above the tolerance or NaN."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping) and wanted.keys() == found.keys():
        return max(_compare(f"{name}['{key}']", found[key], wanted[key], tolerance) for key in wanted)
    if isinstance(wanted, Sequence) and isinstance(found, Sequence) and len(wanted) == len(found):
        pairs = enumerate(zip(found, wanted, strict=True))
        return max(_compare(f"{name}[{place}]", *pair, tolerance) for place, pair in pairs)
    left, right = (torch.as_tensor(side, dtype=torch.float64).detach() for side in (found, wanted))
    if left.shape != right.shape:
        raise InputError(f"The expectation of {name} has shape {tuple(left.shape)}, its target {tuple(right.shape)}.")
    difference = (left - right).abs().reshape(-1)
    if not len(difference):
        return 0.0
    worst = int(difference.argmax())  # the first NaN, where there is one
    if not float(difference[worst]) <= tolerance:
        values = left.reshape(-1)[worst].item(), right.reshape(-1)[worst].item()
        raise LawBroken(
            f"The expectation of {name} is {values[0]:.10g}, where {values[1]:.10g} is right: it is off by "
            f"{abs(values[0] - values[1]):.3g}, more than {tolerance:.1g}."
        )
    return float(difference[worst])
