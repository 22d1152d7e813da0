"""Checkpoints are safetensors, hold one tensor in memory at a time, and refuse what no run writes in one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

import stepwell as sw
from stepwell.errors import CheckpointError
from stepwell.training import checkpoint
from stepwell.training.optimiser import make_optimiser
from stepwell.training.settings import Settings
from stepwell.training.tensor_files import TYPES, TensorFile, write_tensors


def of_every_type():
    """Tensors of all formats and of odd shapes: empty, without dimensions, transposed, a view."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2, (3, 5), generator=generator)
    tensors = {f"{name}.é": numbers.to(dtype) for name, dtype in TYPES.items()}
    wide = torch.randn(4, 6, generator=generator)
    return tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(0.5), "turned": wide.T, "part": wide[1:, ::2]}


def test_a_tensor_file_is_what_safetensors_writes_byte_for_byte(tmp_path):
    tensors = of_every_type()
    with open(tmp_path / "ours", "wb") as file:
        write_tensors(file, tensors)
    theirs = save({name: value.contiguous() for name, value in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == theirs


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    tensors = of_every_type()
    (tmp_path / "file").write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
    found = TensorFile(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.form(name) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_checkpoints_are_listed_newest_first(tmp_path):
    names = ("update-00000009", "update-00000010", "update-123456789")
    for name in names:
        checkpoint.write(tmp_path / name, {}, {})
    for odd in ("update-notes", ".update-00000011.tmp4", "update-00000012x", "other"):
        (tmp_path / odd).mkdir()
    (tmp_path / "update-00000013").write_text("a file")
    assert [path.name for path in checkpoint.complete(tmp_path)] == list(reversed(names))
    assert checkpoint.newest(tmp_path).name == names[-1]
    assert checkpoint.complete(tmp_path / "nowhere") == []
    (tmp_path / names[-1]).rename(tmp_path / f".{names[-1]}.replaced")  # killed while it was replaced
    assert checkpoint.newest(tmp_path).name == names[-1]
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == [names[-1]]


# forged ones


def go(out, resume=False):
    model = sw.exact.markov(symbols=3, length=3, prompts=3, seed=3)
    long = lambda completions, **columns: [float(len(text)) for text in completions]  # noqa: E731
    given = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "learning_rate": 0.1, "minibatches": 2, "keep": 1}
    options = {"kl": 0.1}
    return sw.train(
        model, [{"prompt": i} for i in range(3)], long, "grpo", options=options, out=out, resume=resume, **given
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run with a checkpoint in the middle of a rollout's updates."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepwell.training.loop.Trainer.finish_step", _stop)
        with pytest.raises(KeyError):
            go(folder)
    checkpoint.prune(folder / "checkpoints", 1)  # so that there is no other to go on from
    return folder


def _stop(self, log, progress):
    self.at.part = 1
    raise KeyError


def sealed(folder):
    """Give a changed checkpoint the hashes of its files as they are now."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(entries))


DEEP = "[" * 100_000 + "]" * 100_000
MANIFESTS = {
    "a list": "[]",
    "a number": "3",
    "nothing": "",
    "no object": "null",
    "no file": "{}",
    "deep": DEEP,
    "bytes of another type": '{"state.json": {"bytes": "9", "sha256": "0"}}',
    "no hash": '{"state.json": {"bytes": 9}}',
    "an entry that is a list": '{"state.json": []}',
    "another folder": '{"state.json": {"bytes": 0, "sha256": ""}, "../../run.json": {"bytes": 1, "sha256": ""}}',
    "an absolute name": '{"state.json": {"bytes": 0, "sha256": ""}, "/etc/passwd.json": {"bytes": 1, "sha256": ""}}',
    "a name with a zero": '{"state.json": {"bytes": 1, "sha256": ""}, "a\\u0000.json": {"bytes": 1, "sha256": ""}}',
    "huge": '{"state.json": {"bytes": ' + "9" * 4000 + ', "sha256": ""}}',
    "digits without end": '{"state.json": {"bytes": ' + "9" * 9000 + ', "sha256": ""}}',
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_forged_manifest_is_refused(name, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "run")
    folder = checkpoint.newest(tmp_path / "run" / "checkpoints")
    (folder / "manifest.json").write_bytes(MANIFESTS[name].encode(errors="surrogateescape"))
    refused(tmp_path / "run")


def refused(out):
    with pytest.raises(CheckpointError) as caught:
        go(out, resume=True)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    assert str(out) in said


def changed(*path, to):
    """A change of state.json: the entry at `path` is another value, or is gone where that is a `KeyError`."""

    def change(folder):
        file = folder / "state.json"
        whole = json.loads(file.read_text())
        inside = whole
        for key in path[:-1]:
            inside = inside[key]
        if to is KeyError:
            del inside[path[-1]]
        else:
            inside[path[-1]] = to
        file.write_text(json.dumps(whole))

    return change


def text(content):
    return lambda folder: (folder / "state.json").write_text(content)


def tensor_file(name, content):
    return lambda folder: (folder / f"{name}.safetensors").write_bytes(content)


def tensors(group, **values):
    """A change of a group: tensors by name, `None` for one that is gone, a function of the one that is there."""

    def change(folder):
        file = folder / f"{group}.safetensors"
        whole = dict(TensorFile(file))
        for name in list(whole):
            for end, value in values.items():
                if name.endswith(end):
                    new = None if value is None else value(whole[name])
                    whole.pop(name)
                    whole |= {} if new is None else {name: new}
        file.write_bytes(save({name: value.contiguous() for name, value in whole.items()}))

    return change


def header(text, room=0):
    return len(text).to_bytes(8, "little") + text.encode() + b"\0" * room


FORGED = {
    "state: list": text("[]"),
    "state: null": text("null"),
    "state: text": text('"a"'),
    "state: empty": text(""),
    "state: deep": text(DEEP),
    "state: deep inside": text('{"fingerprint": ' + "[" * 400 + "]" * 400 + "}"),
    "state: odd tensor": text('{"fingerprint": {"tensor": [1]}}'),
    **{
        f"{entry}: gone": changed(entry, to=KeyError)
        for entry in ("fingerprint", "position", "learning_rate", "stream", "planner", "meters", "prompts", "samples")
    },
    **{
        f"{entry}: text": changed(entry, to="x")
        for entry in ("fingerprint", "position", "learning_rate", "stream", "planner", "meters", "prompts", "samples")
    },
    "settings: gone": changed("fingerprint", "settings", to=KeyError),
    "settings: list": changed("fingerprint", "settings", to=[1]),
    "process: text": changed("fingerprint", "process", to="x"),
    "step: text": changed("position", "step", to="1"),
    "step: true": changed("position", "step", to=True),
    "step: fraction": changed("position", "step", to=0.5),
    "step: below 0": changed("position", "step", to=-1),
    "step: huge": changed("position", "step", to=10**30),
    "part: beyond": changed("position", "part", to=10**9),
    "names: number": changed("position", "names", to=3),
    "states: list": changed("position", "states", to=[]),
    "done: gone": changed("position", "done", to=KeyError),
    "order: text": changed("stream", "order", to="x"),
    "order: gone": changed("stream", "order", to=KeyError),
    "meters: odd": changed("meters", to=[{"x": 1}]),
    "meters: no list": changed("meters", to={"x": 1}),
    "meters: none": changed("meters", to=[]),
    "prompts: unknown": changed("prompts", to=[99, 99, 99, 99]),
    "prompts: nested": changed("prompts", to=[[1]]),
    "prompts: few": changed("prompts", to=[0]),
    "parameters: no file": lambda folder: (folder / "parameters.safetensors").unlink(),
    "optimiser: no file": lambda folder: (folder / "optimiser.safetensors").unlink(),
    "reference: no file": lambda folder: (folder / "reference.safetensors").unlink(),
    "targets: no file": lambda folder: (folder / "targets.safetensors").unlink(),
    "parameters: empty": tensor_file("parameters", b""),
    "parameters: no tensors": tensor_file("parameters", header("{}")),
    "parameters: deep": tensor_file("parameters", header(DEEP)),
    "parameters: long header": tensor_file("parameters", (2**63).to_bytes(8, "little") + b"{}"),
    "parameters: list": tensor_file("parameters", header("[1]")),
    "parameters: huge": tensor_file(
        "parameters",
        header('{"logits": {"dtype": "F64", "shape": [1000000000000], "data_offsets": [0, 8000000000000]}}'),
    ),
    "parameters: outside": tensor_file(
        "parameters", header('{"logits": {"dtype": "U8", "shape": [8], "data_offsets": [-4, 4]}}', 8)
    ),
    "parameters: odd type": tensor_file(
        "parameters", header('{"logits": {"dtype": "Q9", "shape": [8], "data_offsets": [0, 8]}}', 8)
    ),
    "parameters: odd shape": tensor_file(
        "parameters", header('{"logits": {"dtype": "U8", "shape": ["8"], "data_offsets": [0, 8]}}', 8)
    ),
    "parameters: gone": tensors("parameters", logits=None),
    "parameters: shape that spreads": tensors("parameters", logits=lambda value: value[:1]),
    "parameters: other type": tensors("parameters", logits=lambda value: value.float()),
    "reference: shape": tensors("reference", logits=lambda value: value[:, :1]),
    "optimiser: shape": tensors("optimiser", exp_avg=lambda value: value[:1]),
    "optimiser: steps": tensors("optimiser", step=lambda value: value.expand(3)),
    "optimiser: half": tensors("optimiser", exp_avg_sq=None),
    "rows: gone": tensors("rows", log_prob=None),
    "rows: shape": tensors("rows", log_prob=lambda value: value[:1]),
    "targets: fewer": tensors("targets", advantage=lambda value: value[:1]),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused(name, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "run")
    folder = checkpoint.newest(tmp_path / "run" / "checkpoints")
    FORGED[name](folder)
    sealed(folder)
    refused(tmp_path / "run")


def test_the_checkpoint_that_is_forged_can_be_resumed_as_it_is(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "run")
    folder = checkpoint.newest(tmp_path / "run" / "checkpoints")
    sealed(folder)
    assert go(tmp_path / "run", resume=True).steps == 2


# memory

MODEL = 100_000_000
"""Bytes of the model of these tests. A step holds it, its gradients and AdamW's two moments."""


def peak():
    """The most bytes that this program ever had in memory.

    `ru_maxrss` would begin with the program that started this one, which may be larger than all that is measured.
    """
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def measure(what, folder, pipe):
    """Send the peak in bytes before anything is there, with a model, after a step, and after saving or resuming."""
    found = [peak()]
    parameters = {str(place): nn.Parameter(torch.ones(500_000)) for place in range(MODEL // 2_000_000)}
    optimiser = make_optimiser(list(parameters.values()), Settings())
    found.append(peak())
    if what == "saving":
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        found.append(peak())
        for _ in range(2):
            groups = {"parameters": parameters, "optimiser": checkpoint.optimiser_tensors(optimiser)}
            checkpoint.write(folder / "update-1", {}, groups)
    else:
        _, groups = checkpoint.read(folder / "update-1")
        groups["parameters"].fill(parameters)
        checkpoint.load_optimiser(optimiser, groups["optimiser"])
    pipe.send([*found, peak()])


def measured(what, folder):
    """The peaks of `measure` from one to the next, in a process of its own, which starts small."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=measure, args=(what, folder, theirs))
    child.start()
    assert ours.poll(120)
    found = ours.recv()
    child.join()
    return [after - before for before, after in itertools.pairwise(found)]


@pytest.mark.slow
def test_saving_and_resuming_add_less_than_a_tenth_to_the_peak_of_a_step(tmp_path):
    """Resuming reads the stored parameters one at a time into those there are, and the moments once."""
    model, step, saving = measured("saving", tmp_path)
    step += model
    assert step > 3.5 * MODEL
    assert saving < step / 10
    model, resuming = measured("resuming", tmp_path)
    assert 2 * MODEL < model + resuming < step
