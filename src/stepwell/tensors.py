"""torch, imported when it is first used: the methods and their cards are printed without waiting for it.

Files that a card is made of import `torch`, its `functional` and `Tensor` from here. To readers and type checkers they
are torch's own.
"""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch.nn import functional as functional
else:

    class _Lazy(types.ModuleType):
        """A module that is imported when the first of its names is asked for; each name is looked up once."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    class _Instances(type):
        """Makes `isinstance(value, Tensor)` ask torch."""

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_Instances):
        """torch's Tensor, for annotations and isinstance."""

    torch = _Lazy("torch")
    functional = _Lazy("torch.nn.functional")
