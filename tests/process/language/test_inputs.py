"""What comes in: folders, tokenizers, prompts, chats, end tokens; each mistake is one clear sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.check.tolerance import tolerance
from stepwell.errors import InputError
from stepwell.process.language.build import language
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout

Build = Callable[..., Language]
CHAT = [{"role": "user", "content": "a b"}]


def refuse(call: Callable[[], Any], *words: str) -> None:
    """The call raises an `InputError` whose message is one line, ends like a sentence and says these words."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert text[-1] in ".?", text
    for word in words:
        assert word in text, text


# prompts


def test_a_chat_is_rendered_with_the_assistants_turn_opened(small_language: Build) -> None:
    process = small_language("qwen2", chat=True)
    tokens = process.condition([CHAT, "c"])
    shown = process.tokenizer.convert_ids_to_tokens(tokens["prompt_ids"][0])
    assert shown == ["<user>", "a", "b", "<assistant>"]
    assert tokens["prompt_mask"].tolist() == [[True] * 4, [False] * 3 + [True]]
    samples = rollout(process, [Request(Prompt(0, CHAT), 2), Request(Prompt(1, "c"), 1)], Rng(0)).samples
    ids = samples.columns["completion_ids"]
    texts = [process.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert samples.values[:2] == [[{"role": "assistant", "content": text}] for text in texts[:2]]
    assert samples.values[2] == texts[2]


def test_the_system_option_goes_before_chats_without_a_system_message(small_language: Build) -> None:
    process = small_language("qwen2", chat=True, system="z")
    own = [{"role": "system", "content": "y"}, *CHAT]
    shown = [process.tokenizer.convert_ids_to_tokens(process.encoder(chat)) for chat in (CHAT, own)]
    assert shown[0][:2] == ["<system>", "z"]
    assert shown[1][:2] == ["<system>", "y"]
    refuse(lambda: process.encoder("a"), "`system`", "chat messages")


def test_bad_prompts(small_language: Build, make_model: Any, make_tokenizer: Any) -> None:
    process = small_language("gpt2")
    refuse(lambda: process.start([CHAT], Rng(0)), "no chat template")
    refuse(lambda: process.start([""], Rng(0)), "empty")
    refuse(lambda: process.start([[]], Rng(0)), "must be a text or a list of messages")
    refuse(lambda: process.start([["a"]], Rng(0)), "must be a text or a list of messages")
    refuse(lambda: process.start(["a " * 65], Rng(0)), "has 65 tokens", "positions for 64")
    other = language(make_model("llama", vocab_size=20), make_tokenizer())
    refuse(lambda: other.start(["z"], Rng(0)), "only 20 tokens", "right tokenizer")
    chat = small_language("llama", chat=True)
    chat.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    refuse(lambda: chat.start([CHAT], Rng(0)), "roles must alternate")


def test_samples_stop_at_the_models_last_position(small_language: Build) -> None:
    process = small_language("gpt2", max_new_tokens=10)
    rows = rollout(process, [Request(Prompt(0, "a " * 61), 4), Request(Prompt(1, "a " * 64), 4)], Rng(0)).trajectories
    ended = torch.isin(rows.action.gather(1, rows.length[:, None] - 1)[:, 0], process.ends)
    assert rows.length.tolist() == torch.where(ended, rows.length, torch.tensor([4] * 4 + [1] * 4)).tolist()
    assert torch.equal(rows.truncated, ~ended)
    with torch.no_grad():
        assert torch.allclose(process.score(rows).log_prob, rows.log_prob, atol=tolerance(process.module))


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_the_tokenizer_in_the_folder_is_the_one_that_was_saved(
    small_language: Build, make_tokenizer: Any, architecture: str
) -> None:
    process = small_language(architecture)
    assert process.encoder("a b <user> c") == make_tokenizer()("a b <user> c")["input_ids"]


# end tokens


def test_samples_end_at_any_end_token(make_model: Any, make_tokenizer: Any) -> None:
    model = make_model("qwen2")
    model.generation_config.eos_token_id = [1, 12]
    process = language(model, make_tokenizer(), eos=[20, "."], max_new_tokens=25)
    assert process.ends.tolist() == [1, 7, 12, 20]
    drawn = rollout(process, [Request(Prompt(0, "a"), 40)], Rng(0))
    ids, truncated = drawn.samples.columns["completion_ids"], drawn.trajectories.truncated.tolist()
    assert {row[-1] for row, cut in zip(ids, truncated, strict=True) if not cut} <= {1, 7, 12, 20}
    assert len({row[-1] for row, cut in zip(ids, truncated, strict=True) if not cut}) >= 3
    assert all(not {1, 7, 12, 20} & set(row[:-1]) for row in ids)
    assert all(len(row) == 25 and row[-1] not in {1, 7, 12, 20} for row, cut in zip(ids, truncated, strict=True) if cut)


def test_end_and_padding_tokens_that_are_missing(make_model: Any, make_tokenizer: Any) -> None:
    bare = {"eos_token_id": None, "pad_token_id": None}
    assert language(make_model("qwen2"), make_tokenizer(pad=False)).pad == 1  # the end token pads
    refuse(lambda: language(make_model("qwen2"), make_tokenizer(pad=False, eos=False)), "neither a padding nor")
    refuse(lambda: language(make_model("qwen2", **bare), make_tokenizer(eos=False)), "end-of-sequence", "eos=")
    assert language(make_model("qwen2", **bare), make_tokenizer(eos=False), eos="z").ends.tolist() == [33]
    refuse(
        lambda: language(make_model("qwen2"), make_tokenizer(), eos="zz"),
        "eos must be one token of this tokenizer, got 'zz'",
    )
    refuse(
        lambda: language(make_model("qwen2"), make_tokenizer(), eos=34), "eos must be a token id from 0 to 33, got 34"
    )


# options


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": -2},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
        {"chunk": 0},
        {"tokens_at_once": -1},
        {"compile": "max-autotune"},
        {"dtype": "int8"},
        {"dtype": torch.int32},
    ],
)
def test_bad_options(options: dict[str, Any], make_model: Any, make_tokenizer: Any) -> None:
    refuse(lambda: language(make_model("qwen2"), make_tokenizer(), **options), f"{next(iter(options))} must be ")


def test_an_unknown_option_is_an_error(make_model: Any, make_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="'temprature'; did you mean 'temperature'"):
        language(make_model("qwen2"), make_tokenizer(), temprature=1.0)  # type: ignore[call-arg]


# folders


def test_bad_folders(tmp_path: Path, model_folder: Callable[..., Path], make_model: Any) -> None:
    refuse(lambda: language(tmp_path / "absent"), "no model folder", "absent")
    refuse(lambda: language("./absent"), "no model folder")
    refuse(lambda: language(tmp_path), "no config.json")
    refuse(lambda: language(7), "got int")  # type: ignore[arg-type]
    refuse(lambda: language(make_model("qwen2")), "needs its tokenizer")

    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder("qwen2"), pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    refuse(lambda: language(pickled), "safetensors")

    code = tmp_path / "code"
    shutil.copytree(model_folder("qwen2"), code)
    config = json.loads((code / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (code / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto_map}))
    (code / "evil.py").write_text("raise SystemExit('code of the model was run')")
    refuse(lambda: language(code), "cannot be loaded")

    silent = tmp_path / "silent"
    make_model("qwen2").save_pretrained(silent)
    refuse(lambda: language(silent), "holds no tokenizer")

    encoder = tmp_path / "encoder"
    shutil.copytree(model_folder("qwen2"), encoder)
    (encoder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refuse(lambda: language(encoder), "is a vit, which has no head over tokens")


@pytest.mark.slow
def test_importing_is_light() -> None:
    code = (
        "import sys; import stepwell.process.language.process; sys.exit(len({'transformers', 'peft'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
