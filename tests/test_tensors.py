"""The torch that cards are made of is torch itself, imported when it is first used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from stepwell import tensors


def test_the_names_are_torch_s_own():
    assert tensors.torch.exp is torch.exp
    assert tensors.torch.nn.Module is torch.nn.Module
    assert tensors.functional.logsigmoid is torch.nn.functional.logsigmoid
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tensors.torch.no_such_name


def test_a_tensor_is_an_instance_and_nothing_else_is():
    assert isinstance(torch.zeros(1), tensors.Tensor)
    assert isinstance(torch.nn.Parameter(torch.zeros(1)), tensors.Tensor)
    assert isinstance(torch.zeros(1), tensors.Tensor | float)
    assert not isinstance([0.0], tensors.Tensor)
    assert not isinstance(0, tensors.Tensor | float)


def test_torch_is_imported_when_it_is_first_used():
    script = (
        "import sys\nfrom stepwell.tensors import Tensor, functional, torch\n"
        "assert 'torch' not in sys.modules\n"
        "assert torch.ones(2).sum() == 2 and isinstance(torch.ones(1), Tensor)\n"
        "assert sys.modules['torch'].ones is torch.ones"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
