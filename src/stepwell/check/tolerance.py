"""Rounding that an honest computation may show, from the type of its numbers and the length of its sums."""

from __future__ import annotations

import math

import torch
from torch import nn

DEVIATIONS = 8.0
"""The d of `rounding`: larger errors have a probability below 1e-13 for each product that is summed."""

ELEMENTARY = 100
"""Terms that are counted for what no weight has a part in: norms, softmax, attention over positions, a density."""

STORED = 5
"""Last digits by which results that are stored in 16 bits may differ, their sums being taken in float32."""

FINEST = 1e-10
"""The finest difference that a law of a process is held to: what is smaller in float64 is nobody's mistake."""


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The largest difference of two sums of the same `terms` products in two orders, relative to sum_i |x_i| |y_i|.

    A sum of n products in any order is off by at most gamma_n = n u / (1 - n u) of that, u being half the machine
    epsilon (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 3.1). Roundings that are
    independent, and up as often as down, keep it with a probability of at least 1 - 2 n exp(-d^2 (1 - u)^2 / 2) to
    exp(d sqrt(n) u + n u^2 / (1 - u)) - 1, about d sqrt(n) u (Higham and Mary 2019, SIAM J. Sci. Comput. 41(5),
    theorem 2.4). This is the bound used, with d = `DEVIATIONS`, and twice, as each of the two sums is off.

    Where one sum goes into the next, `terms` counts the products of all sums on the longest way from the input to the
    number, since gamma_j + gamma_k + gamma_j gamma_k <= gamma_(j + k) (lemma 3.3 there). That takes the layers in
    between to hand on a relative error as they find it. It is no bound where a layer enlarges it, as a difference of
    large, nearly equal numbers does. In 16 bits layers add up in float32 and round what they store, and `STORED` last
    digits are allowed on top.

    Example:
        >>> f"{rounding(torch.float32, 644):.1e}, {rounding(torch.float64, 644):.1e}"
        '2.4e-05, 4.5e-14'
    """
    if torch.finfo(dtype).bits < 32:
        return STORED * torch.finfo(dtype).eps + rounding(torch.float32, terms)
    unit = torch.finfo(dtype).eps / 2
    return 2 * math.expm1(DEVIATIONS * math.sqrt(terms) * unit + terms * unit**2 / (1 - unit))


def products(module: nn.Module) -> int:
    """The products that are summed on the way through all layers of a network, one after another.

    Each weight counts with the inputs of one output (features, or channels times the kernel), as if no two layers
    stood side by side, and `ELEMENTARY` covers the rest.
    """
    weights = (parameter for parameter in module.parameters() if parameter.dim() > 1)
    return ELEMENTARY + sum(weight[0].numel() for weight in weights)


def tolerance(module: nn.Module, *dtypes: torch.dtype) -> float:
    """Rounding of a network's numbers, relative to 1 + |number|: of the coarsest of its parameters' types and `dtypes`.

    Never below `FINEST`.
    """
    kinds = {parameter.dtype for parameter in module.parameters()} | set(dtypes)
    return max(FINEST, *(rounding(kind, products(module)) for kind in kinds if kind.is_floating_point))
