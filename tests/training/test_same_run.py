"""A checkpoint is gone on from by the run that it is of, and by no other: all that decides numbers is guarded."""

from __future__ import annotations

import hashlib
import json
import shutil
import time

import pytest
import torch

import stepwell as sw
from stepwell import digests
from stepwell.digests import weights_digest
from stepwell.errors import CheckpointError
from stepwell.reward.loading import load_reward
from stepwell.reward.verifiers import regular_expression
from stepwell.sampling.request import Prompt
from stepwell.training.fingerprint import rows_digest

REWARD = "import scale\n\ndef long(completions, **_):\n    return [scale.of(str(text)) for text in completions]\n"
SCALE = "def of(text):\n    return float(len(text))\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
LORA = {"r": 2, "lora_alpha": 4}
CHAT = [{"role": "user", "content": "a b"}]


@pytest.fixture
def folder(tmp_path, model_folder):
    """A folder of a user's: the model in `model`, the reward in `mine.py`, which imports a neighbour."""
    shutil.copytree(model_folder("qwen2", chat=True), tmp_path / "model")
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "scale.py").write_text(SCALE)
    return tmp_path


def go(folder, resume=False, model=None, reward=None, data=None, method="grpo", teacher=None, **settings):
    options = {"max_new_tokens": 3, "device": "cpu", **(model or {})}
    process = sw.language(folder / "model", **options)
    given = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "learning_rate": 0.01, **settings}
    return sw.train(
        process,
        data or [{"prompt": CHAT, "answer": "a"}],
        reward or load_reward(f"{folder / 'mine.py'}:long"),
        method,
        out=folder / "run",
        resume=resume,
        teacher=None if teacher is None else sw.language(folder / teacher, max_new_tokens=3, device="cpu"),
        **given,
    )


def change_state(folder, change):
    """Change the newest checkpoint as if it had been written so."""
    (state,) = (folder / "run" / "checkpoints").glob("update-00000001/state.json")
    content = json.loads(state.read_text())
    change(content)
    state.write_text(json.dumps(content))
    manifest = state.with_name("manifest.json")
    entries, text = json.loads(manifest.read_text()), state.read_bytes()
    entries["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest.write_text(json.dumps(entries))


def edited(path, before, after):
    path.write_text(path.read_text().replace(before, after))
    time.sleep(0.01)


OTHERS = {
    "alpha": (
        {"lora": LORA},
        {"lora": LORA | {"lora_alpha": 8}},
        r"another process \(adapter's lora alpha was 4, now 8",
    ),
    "rank-stabilised": ({"lora": LORA}, {"lora": LORA | {"use_rslora": True}}, "use rslora was false, now true"),
    "dropout": ({"lora": LORA}, {"lora": LORA | {"lora_dropout": 0.5}}, r"lora dropout was 0.0, now 0.5"),
    "system": ({"system": "a"}, {"system": "b"}, 'system was "a", now "b"'),
    "template": ({}, {"chat_template": TEMPLATE}, "chat template was another"),
    "variables": (
        {},
        {"chat_template_kwargs": {"thinking": False}},
        "chat_template_kwargs's thinking was null, now false",
    ),
    "special tokens": ({}, {"keep_special_tokens": True}, "keep special tokens was false, now true"),
    "ends": ({}, {"eos": "c"}, "ends was"),
    "temperature": ({}, {"temperature": 0.5}, "truncation was another"),
}


@pytest.mark.parametrize("which", OTHERS)
def test_a_model_that_is_made_in_another_way(which, folder):
    before, after, said = OTHERS[which]
    go(folder, model=before)
    with pytest.raises(CheckpointError, match=said):
        go(folder, resume=True, model=after, steps=2)
    assert go(folder, resume=True, model=before, steps=2).steps == 2


def test_another_base_under_an_adapter(folder):
    from safetensors.torch import load_file, save_file

    go(folder, model={"lora": LORA})
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is of another base; resume with the weights that do not learn"):
        go(folder, resume=True, model={"lora": LORA}, steps=2)


def test_a_configuration_that_was_edited(folder):
    go(folder)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="configuration was another"):
        go(folder, resume=True, steps=2)


@pytest.mark.parametrize("file", ["mine.py", "scale.py"])
def test_a_reward_whose_code_or_whose_neighbour_was_edited(file, folder):
    go(folder)
    edited(folder / file, "str(text)" if file == "mine.py" else "len(text)", "text[0]" if file == "mine.py" else "2.0")
    with pytest.raises(
        CheckpointError, match=r"another reward \(the code of long or what it was made with has changed"
    ):
        go(folder, resume=True, steps=2)


def test_a_reward_that_was_made_with_something_else(folder):
    go(folder, reward=regular_expression("a"))
    with pytest.raises(CheckpointError, match="or what it was made with has changed"):
        go(folder, resume=True, reward=regular_expression("b"), steps=2)
    assert go(folder, resume=True, reward=regular_expression("a"), steps=2).steps == 2


def test_other_answers_to_the_same_prompts(folder):
    go(folder)
    with pytest.raises(CheckpointError, match="is of another data; resume with the prompts and their columns"):
        go(folder, resume=True, data=[{"prompt": CHAT, "answer": "b"}], steps=2)


def test_another_teacher(folder):
    from safetensors.torch import load_file, save_file

    for name in ("one", "two"):
        shutil.copytree(folder / "model", folder / name)
    tensors = load_file(folder / "two" / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "two" / "model.safetensors", metadata={"format": "pt"})
    go(folder, method="on-policy-distillation", teacher="one")
    with pytest.raises(CheckpointError, match="is of another teacher; resume with the teacher"):
        go(folder, resume=True, method="on-policy-distillation", teacher="two", steps=2)


def test_another_tokenizer(folder):
    file = folder / "model" / "tokenizer.json"
    go(folder)
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"another process \(.*tokenizer was another"):
        go(folder, resume=True, steps=2)


def flowing(folder, resume=False, data=(0, 1), steps=1, **changes):
    """A run of a flow whose network, condition and decoder are the caller's own."""
    given = {"encode": "label", "decode": Shifted(0.0), "shape": (2,), **changes}
    torch.manual_seed(0)
    network = given.pop("network", None) or Labelled()
    process = sw.flow(network, steps=2, **given)
    settings = {"steps": steps, "prompts_per_step": 2, "group_size": 2, "learning_rate": 0.01}
    rewards = given.pop("reward", lambda completions, **_: [float(each.sum()) for each in completions])
    return sw.train(process, list(data), rewards, "flow-grpo", out=folder / "flow", resume=resume, **settings)


class Labelled(torch.nn.Module):
    """A velocity that a class moves."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LeakyReLU(slope))

    def forward(self, x, t, label):
        return self.layers(x) + label[:, None]


class Shifted:
    """A decoder with a setting of its own."""

    def __init__(self, by):
        self.by = by

    def __call__(self, states):
        return states + self.by


def own_label(prompts):
    return {"label": torch.tensor(prompts)}


FLOWS = {
    "decoder": ({"decode": Shifted(1.0)}, "decode was another"),
    "no decoder": ({"decode": None}, 'decode was "Shifted'),
    "encoder": ({"encode": own_label}, "encode was another"),
    "layers": ({"network": Labelled(0.5)}, "network was another"),
}


@pytest.mark.parametrize("which", FLOWS)
def test_what_stands_around_a_flow(which, tmp_path):
    changes, said = FLOWS[which]
    flowing(tmp_path)
    with pytest.raises(CheckpointError, match=rf"another process \({said}"):
        flowing(tmp_path, resume=True, steps=2, **changes)
    assert flowing(tmp_path, resume=True, steps=2).steps == 2


def test_the_condition_of_no_prompt(tmp_path):
    guided = {"encode": own_label, "guidance": 2.0}
    flowing(tmp_path, unconditional={"label": torch.tensor([0])}, **guided)
    with pytest.raises(CheckpointError, match="unconditional was another"):
        flowing(tmp_path, resume=True, steps=2, unconditional={"label": torch.tensor([5])}, **guided)


def test_a_function_inside_a_network_that_was_edited(tmp_path):
    from stepwell.reward.loading import load_function

    def go(resume=False, steps=1):
        network = Labelled()
        network.own = load_function(f"{tmp_path / 'own.py'}:curve", "function")
        network.forward = lambda x, t, label: network.own(network.layers(x))
        return flowing(tmp_path, resume, steps=steps, network=network)

    (tmp_path / "own.py").write_text("def curve(x):\n    return x * 2.0\n")
    go()
    edited(tmp_path / "own.py", "2.0", "3.0")
    with pytest.raises(CheckpointError, match=r"another code \(that of curve has changed"):
        go(resume=True, steps=2)


def test_data_that_write_themselves_in_part(tmp_path):
    """The middle of a large tensor is not in its text."""
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1.0
    assert repr(long) == repr(other)
    digests = [rows_digest([Prompt(0, value, {})]) for value in (long, other, long.numpy(), other.numpy(), [long])]
    digests += [rows_digest([Prompt(0, None, {"answer": [value]})]) for value in (long, other)]
    assert len(set(digests)) == len(digests)
    assert rows_digest([Prompt(0, long.clone(), {})]) == digests[0]


def test_a_picture_is_known_by_its_points():
    image = pytest.importorskip("PIL.Image")
    digests = [rows_digest([Prompt(0, image.new("RGB", size, colour), {})]) for size, colour in PICTURES]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


PICTURES = [((4, 4), 0), ((4, 4), 9), ((2, 8), 0), ((4, 4), 0)]


def test_a_run_may_be_evaluated_from_now_on_and_no_longer(folder):
    held_out = {"evaluation": [{"prompt": CHAT, "answer": "a"}], "evaluate_every": 1}
    go(folder)
    assert "evaluation/reward" in go(folder, resume=True, steps=2, **held_out).history[-1]
    with pytest.raises(CheckpointError, match="is of another evaluation; resume with the prompts to evaluate on"):
        go(folder, resume=True, steps=3, **held_out | {"evaluation": [{"prompt": CHAT, "answer": "b"}]})
    assert "evaluation/reward" not in go(folder, resume=True, steps=3).history[-1]


def test_packages_that_were_not_there_before_are_no_damage(folder):
    go(folder)
    change_state(folder, lambda content: content["fingerprint"]["made with"].pop("peft"))
    assert go(folder, resume=True, steps=2).steps == 2


def test_what_may_change(folder):
    go(folder)
    free = {"keep": 5, "checkpoint_every": 3, "checkpoint_seconds": 9.0, "tokens_per_microbatch": 64}
    assert go(folder, resume=True, steps=3, **free).steps == 3


def test_all_of_it_is_in_the_description_of_the_run(folder):
    go(folder)
    about = json.loads((folder / "run" / "run.json").read_text())
    assert (
        about["fingerprint"] == json.loads(next(folder.glob("run/checkpoints/*/state.json")).read_text())["fingerprint"]
    )
    assert about["fingerprint"]["reward"][0]["name"] == "long"


@pytest.mark.parametrize("what", ["torch", "threads"])
def test_another_machine_is_warned_of(what, folder):
    go(folder)
    change_state(folder, lambda content: content["fingerprint"]["made with"].update({what: "0.1"}))
    with pytest.warns(UserWarning, match=f"{what} was 0.1, now"):
        go(folder, resume=True, steps=2)


def test_every_bit_and_its_place_is_in_a_digest():
    plain = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(2) > 0}
    whole = weights_digest(plain)
    assert weights_digest({name: value.clone() for name, value in reversed(plain.items())}) == whole
    others = [
        {"a": plain["a"].flip(0)},
        {"a": plain["a"].reshape(4, 3)},
        {"a": plain["a"].double()},
        {"a": torch.nextafter(plain["a"], torch.tensor(9.0))},
        {"b": plain["b"].half()},
        {"c": ~plain["c"]},
    ]
    assert len({whole, *(weights_digest({**plain, **other}) for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("block", [4, 5, 100])
def test_a_digests_sums_are_of_words_and_of_words_times_their_places(block, monkeypatch):
    """In plain numbers; where words are summed in blocks, each block's places begin anew, beyond those before."""
    monkeypatch.setattr(digests, "BLOCK", block)
    words = [7, -3, 2**62, 11, 2**63 - 1, -(2**63), 5, 1, -9, 4]
    places = [index % block + 1 + (index // block + 1) * block for index in range(len(words))]

    def wrapped(number):
        return (number + 2**63) % 2**64 - 2**63

    expected = wrapped(sum(words)), wrapped(sum(word * place for word, place in zip(words, places, strict=True)))
    assert digests._sums(torch.tensor(words)) == expected
