"""`stepwell export`: the model of a run that was stopped, as the folder that the run would have left at its end."""

from __future__ import annotations

import json
import shutil

import pytest

from stepwell.cli import main

SPREAD = "def spread(completions, **_):\n    return [sum(map(ord, text)) / 100 for text in completions]"
"""A reward that tells nearly all samples apart, so that the model that is taken out is not the one that came in."""


def stopped(bench, *words):
    """A run that is over, and the same without its model, as Ctrl-C would have left it after the last step."""
    bench.write("spread.py", SPREAD)
    assert main(bench.words("--reward", "spread.py:spread", "--learning-rate", "0.01", *words)) == 0
    assert json.loads((bench.out / "metrics.jsonl").read_text().splitlines()[-1])["gradient_norm"] > 0
    shutil.copytree(bench.out, bench.folder / "cut")
    for path in (bench.folder / "cut").iterdir():
        if path.name not in ("checkpoints", "run.json", "metrics.jsonl", "clock.jsonl", "completions.jsonl"):
            path.unlink()


KINDS = {
    "whole": ((), ["model.safetensors", "config.json", "tokenizer.json"]),
    "critic": (("--method", "ppo"), ["model.safetensors", "value_head.safetensors"]),
    "adapter": (("--lora-rank", "2", "--lora-alpha", "8", "--learning-rate", "0.1"), ["model.safetensors"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_gives_the_model_that_it_would_have_written(bench, kind):
    words, files = KINDS[kind]
    stopped(bench, *words)
    assert main(["export", "cut", "--out", "taken"]) == 0
    for name in files:
        assert (bench.folder / "taken" / name).read_bytes() == (bench.out / name).read_bytes(), name


def test_an_adapter_can_be_taken_alone(bench):
    stopped(bench, "--lora-rank", "2")
    assert main(["export", "cut", "--out", "taken", "--adapter"]) == 0
    assert (bench.folder / "taken" / "adapter_model.safetensors").is_file()


def test_a_flow_of_ones_own_and_names_that_were_meant_from_another_folder(flows, monkeypatch):
    assert main(flows.training()) == 0
    (flows.folder / "elsewhere").mkdir()
    monkeypatch.chdir(flows.folder / "elsewhere")
    assert main(["export", "../run", "--out", "taken"]) == 0
    written = (flows.folder / "elsewhere" / "taken" / "model.safetensors").read_bytes()
    assert written == (flows.folder / "run" / "model.safetensors").read_bytes()


def test_a_conversations_model_is_the_one_that_the_run_has_written(talk):
    assert main(talk.words("--learning-rate 0.01 --turn-stop a e o")) == 0
    assert main(["export", "run", "--out", "taken"]) == 0
    assert same(talk.folder, "run", "taken")
    assert not same(talk.folder, "taken", talk.models["plain"])


def same(folder, one, other, pattern="model.safetensors"):
    """Whether the weights in two folders are the same, of which there are some."""
    files = [sorted((folder / place).rglob(pattern)) for place in (one, other)]
    files[0] = [file for file in files[0] if "checkpoints" not in file.parts]
    assert len(files[0]) == len(files[1]) > 0
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(bench):
    """And what is exported then is the model of the step before; where none is whole, nothing is written."""
    stopped(bench, "--checkpoint-every", "1", "--keep", "9")
    checkpoints = bench.folder / "cut" / "checkpoints"
    newest = max(checkpoints.iterdir())
    with (newest / "parameters.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.warns(UserWarning, match="is damaged: 200 bytes.* The checkpoint before it is exported"):
        assert main(["export", "cut", "--out", "taken"]) == 0
    shutil.rmtree(newest)
    assert main(["export", "cut", "--out", "before"]) == 0
    assert same(bench.folder, "taken", "before")
    assert not same(bench.folder, "taken", "run")
    for folder in sorted(checkpoints.iterdir())[1:]:
        shutil.rmtree(folder)
    (next(checkpoints.iterdir()) / "manifest.json").write_text("{}")
    assert "is not the list of a checkpoint's files" in bench.refused("export", "cut", "--out", "none")
    assert not (bench.folder / "none").exists()


def test_what_cannot_be_exported(bench):
    refused = bench.refused
    assert "is no folder of a run" in refused("export", "nowhere", "--out", "taken")
    (bench.folder / "odd").mkdir()
    for text, said in (
        ("{", "is no JSON"),
        ("[]", "was not made by `stepwell train`"),
        ('{"model": "m", "command": {"arguments": 3}}', "was not made by `stepwell train`"),
    ):
        (bench.folder / "odd" / "run.json").write_text(text)
        assert said in refused("export", "odd", "--out", "taken")
    stopped(bench)
    assert "--adapter must be left out" in refused("export", "cut", "--out", "taken", "--adapter")
    assert "holds something already" in refused("export", "cut", "--out", "run")
    about = json.loads((bench.folder / "cut" / "run.json").read_text())
    (bench.folder / "cut" / "run.json").write_text(json.dumps(about | {"model": "./gone"}))
    assert "There is no model folder './gone'" in refused("export", "cut", "--out", "taken")
    shutil.rmtree(bench.folder / "cut" / "checkpoints")
    assert "holds no checkpoint" in refused("export", "cut", "--out", "taken")
    assert not (bench.folder / "taken").exists()


@pytest.mark.parametrize("part", ["base", "process"])
def test_a_model_that_has_changed_since_is_not_exported(part, bench):
    from safetensors.torch import load_file, save_file

    stopped(bench, "--lora-rank", "2")
    folder = bench.folder / bench.words()[bench.words().index("--model") + 1]
    shutil.copytree(folder, bench.folder / "moved")
    about = json.loads((bench.folder / "cut" / "run.json").read_text())
    (bench.folder / "cut" / "run.json").write_text(json.dumps(about | {"model": "moved"}))
    if part == "base":
        tensors = load_file(bench.folder / "moved" / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, bench.folder / "moved" / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((bench.folder / "moved" / "config.json").read_text())
        (bench.folder / "moved" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert f"is of another {part}" in bench.refused("export", "cut", "--out", "taken")
    assert not (bench.folder / "taken").exists()
