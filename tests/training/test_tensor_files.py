"""A safetensors file is read only where its header is one that could have been written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from stepwell.errors import CheckpointError
from stepwell.training.tensor_files import TensorFile


def forged(tmp_path, room=24, **entry):
    """A file of 24 bytes of numbers, whose only tensor is said to be this."""
    given = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | entry
    text = json.dumps({"w": given}).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * room)
    return tmp_path / "file"


def test_the_file_that_is_forged_below_is_a_good_one(tmp_path):
    assert TensorFile(forged(tmp_path)).form("w") == (torch.float32, torch.Size([2, 3]))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [-2, -3]}, "has the shape"),
        ({"shape": [2.0, 3]}, "has the shape"),
        ({"shape": ["2", 3]}, "has the shape"),
        ({"shape": [True, 6]}, "has the shape"),
        ({"shape": [2**48, 0], "data_offsets": [0, 0]}, "has the shape"),
        ({"shape": [6] + [1] * 64}, "has the shape"),
        ({"shape": [2, 4]}, "has 24 bytes for the shape"),
        ({"dtype": "F64"}, "has 24 bytes for the shape"),
        ({"data_offsets": [1, 25]}, "lies outside"),
        ({"data_offsets": [-24, 0]}, "lies outside"),
        ({"data_offsets": [0.0, 24]}, "lies outside"),
        ({"data_offsets": [24, 0], "shape": [-6]}, "has the shape"),
        ({"dtype": "F7"}, "is not a safetensors file"),
        ({"data_offsets": [0]}, "is not a safetensors file"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(entry, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        TensorFile(forged(tmp_path, **entry))


def test_the_most_that_a_shape_may_have_is_read(tmp_path):
    found = TensorFile(forged(tmp_path, shape=[6] + [1] * 63))
    assert found["w"].shape == (6, *[1] * 63)
    wide = TensorFile(forged(tmp_path, shape=[2**48 - 1, 0], data_offsets=[24, 24]))
    assert wide.form("w")[1] == (2**48 - 1, 0)


@pytest.mark.parametrize(("size", "said"), [(0, "its header has 0 bytes"), (1, "1 bytes"), (10**6, "1000000 bytes")])
def test_a_header_of_an_impossible_length_is_refused(size, said, tmp_path):
    (tmp_path / "file").write_bytes(size.to_bytes(8, "little") + b"{}" + b" " * 40)
    with pytest.raises(CheckpointError, match=said):
        TensorFile(tmp_path / "file")


def test_the_shortest_file_holds_nothing(tmp_path):
    (tmp_path / "file").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert len(TensorFile(tmp_path / "file")) == 0


def test_filling_changes_nothing_unless_all_of_it_fits(tmp_path):
    (tmp_path / "file").write_bytes(save({"a": torch.ones(2), "b": torch.ones(3)}))
    found = TensorFile(tmp_path / "file")
    a, b = torch.zeros(2), torch.zeros(3)
    for live, said in (
        ({"a": a}, "holds a tensor 'b'"),
        ({"a": a, "b": b, "c": b}, "holds no tensor 'c'"),
        ({"a": a, "b": torch.zeros(4)}, r"of shape \(3,\), which has to be torch.float32 of shape \(4,\)"),
        ({"a": a, "b": b.double()}, "which has to be torch.float64"),
    ):
        with pytest.raises(CheckpointError, match=said):
            found.fill(live)
        assert not a.any()
    found.fill({"a": a, "b": b})
    assert a.all()
    assert b.all()
