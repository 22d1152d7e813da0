"""Compiled parts change no number beyond rounding, are tried first, and give way to the plain path with one warning."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.check.tolerance import rounding, tolerance
from stepwell.process.language import compiled
from stepwell.process.language.build import language
from stepwell.process.language.process import Language
from stepwell.rng import Rng
from stepwell.sampling.request import Prompt, Request
from stepwell.sampling.rollout import rollout
from stepwell.trajectories import Trajectories

Build = Callable[..., Language]
Forward = Callable[..., torch.Tensor]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.3}
PROMPTS = ["a b c d", "e", "f g h a b c d e f g"]
GRADIENT = rounding(torch.float32, 10_000)  # products on the way there and back, summed over all tokens


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Compiled parts that disagree warn and give way; here they have to hold, unless a test expects the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not compiled")
        yield


@pytest.fixture
def as_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Forward], Forward]], None]:
    """`as_code(change)`: what stands in for `torch.compile`, which takes tens of seconds."""
    return lambda change: monkeypatch.setattr(compiled, "_code", change)


@pytest.fixture
def really_compiled() -> Iterator[None]:
    """torch forgets what it compiled for other tests: eight pieces of code are the most it keeps of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(process: Language, seed: int = 0) -> Trajectories:
    """Groups of prompts of several lengths, and forks from the middle of some of their rows."""
    requests = [Request(Prompt(i, text), 3 + i) for i, text in enumerate(PROMPTS)]
    drawn = rollout(process, requests, Rng(seed))
    rows = (drawn.trajectories.length >= 3).nonzero()[:3, 0].tolist()
    forks = [Request(drawn.prompts[row], count=2, start=(row, 2)) for row in rows]
    return (drawn + rollout(process, forks, Rng(seed + 1), so_far=drawn.trajectories)).trajectories


def learned(process: Language, rows: Trajectories, reference: Language | None = None) -> dict[str, torch.Tensor]:
    """Scores and gradients of something that depends on all of them, on a KL too where there is a reference."""
    needs = () if reference is None else ("kl",)
    process.module.zero_grad()
    scores = process.score(rows, needs, reference=reference)
    weight = torch.linspace(-1, 1, rows.mask.numel()).view(rows.mask.shape)
    sum(((value * weight).sum() for value in (scores.log_prob, *(scores[need] for need in needs))), 0).backward()
    gradients = {name: p.grad.clone() for name, p in process.module.named_parameters() if p.grad is not None}
    return {"log_prob": scores.log_prob.detach(), **{need: scores[need].detach() for need in needs}, **gradients}


def scored(process: Language, rows: Trajectories) -> torch.Tensor:
    with torch.no_grad():
        return process.score(rows).log_prob


def same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rounding: float) -> None:
    """Every number is right up to `rounding`, relative to the largest of its kind or to 1."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert float((found[name] - value).abs().max()) <= rounding * max(float(value.abs().max()), 1.0), name


def warned(work: Callable[[], Any]) -> list[str]:
    """The warnings about compiling while `work` is done."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        work()
    return [str(warning.message) for warning in heard if "is not compiled" in str(warning.message)]


# which parts, and how they are called


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "gemma2", "cohere", "granite", "bloom"])
def test_every_token_of_every_layer_goes_through_the_code_once(
    small_language: Build, as_code: Any, architecture: str
) -> None:
    seen: list[tuple[str, int]] = []

    def watched(forward: Forward) -> Forward:
        def code(part: Any, *values: torch.Tensor) -> torch.Tensor:
            seen.append((type(part).__name__, values[0].shape[0] * values[0].shape[1]))
            assert values[0].shape[0] == 1
            return forward(part, *values)

        return code

    as_code(watched)
    # two of them cannot pad in double; in single precision a product of other rows may round otherwise
    dtype, rounding = ("float32", GRADIENT) if architecture in ("gemma2", "bloom") else ("float64", 1e-10)
    process, plain = (small_language(architecture, dtype=dtype, compile=given) for given in (True, False))
    rows = draw(process)
    assert not seen, "rollouts stay as they are"
    same(learned(process, rows), learned(plain, rows), rounding)
    assert process.network.compiled is not None
    assert process.network.compiled.agrees == {"learn": True}
    same({"": scored(process, rows)}, {"": scored(plain, rows)}, rounding)
    assert process.network.compiled.agrees == {"learn": True, "score": True}
    seen.clear()
    before = process.meter.spent
    scored(process, rows)
    read = (process.meter.spent - before).forward
    layers, parts = process.network.causal.config.num_hidden_layers, [name for name, _ in seen]
    assert sum("mlp" in name.lower() for name in parts) == layers
    assert sum("norm" in name.lower() for name in parts) >= layers
    assert all(tokens >= read for _, tokens in seen)  # padding included, where rows are read side by side


def test_the_meter_and_the_random_numbers_are_those_of_a_plain_run(small_language: Build, as_code: Any) -> None:
    as_code(lambda forward: forward)
    spent = []
    for given in (True, False):
        process = small_language("qwen2", compile=given)
        torch.manual_seed(3)
        rows = draw(process)
        learned(process, rows)
        scored(process, rows)
        spent.append((process.meter.spent, torch.get_rng_state(), rows.action))
    (cost, state, action), (plain_cost, plain_state, plain_action) = spent
    assert cost == plain_cost
    assert torch.equal(state, plain_state)
    assert torch.equal(action, plain_action)


def test_copies_and_files_know_nothing_of_it(small_language: Build, as_code: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    as_code(lambda forward: forward)
    process, plain = small_language("qwen2", compile=True), small_language("qwen2")
    rows = draw(process)
    learned(process, rows)
    assert not any("forward" in vars(module) for module in process.module.modules())
    assert list(process.module.state_dict()) == list(plain.module.state_dict())
    reference = process.frozen()
    with torch.no_grad():
        for parameter in process.module.parameters():
            parameter.mul_(1.1)
    twin = copy.deepcopy(process)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(0.5)
    assert float((scored(twin, rows) - scored(process, rows)).abs().max()) > 0.1  # each with weights of its own
    assert torch.equal(scored(reference, rows), scored(plain, rows))
    process.save(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = language(tmp_path, device="cpu", max_new_tokens=10)
    assert float((scored(loaded, rows) - scored(process, rows)).abs().max()) <= tolerance(process.module)


# giving way


def broken(forward: Forward) -> Forward:
    def code(*values: Any) -> torch.Tensor:
        raise RuntimeError("no compiler.\nSee above.")

    return code


def wrong(forward: Forward) -> Forward:
    return lambda *values: 1.01 * forward(*values)


def wrong_backward(forward: Forward) -> Forward:
    def code(*values: Any) -> torch.Tensor:
        right = forward(*values)
        return right.detach() + 1.3 * (right - right.detach())

    return code


@pytest.mark.parametrize("part", [broken, wrong, wrong_backward])
def test_what_fails_or_is_wrong_gives_way_with_one_warning(small_language: Build, as_code: Any, part: Any) -> None:
    as_code(part)
    process, plain = small_language("qwen2", compile=True), small_language("qwen2")
    rows = draw(process)
    reference, plain_reference = process.frozen(), plain.frozen()
    answers: list[Any] = []

    def work() -> None:
        answers.extend([learned(process, rows, reference), scored(process, rows), learned(process, rows, reference)])

    heard = warned(work)
    reason = "no compiler" if part is broken else "compiled, it gives other numbers"
    assert heard == [f"Qwen2ForCausalLM is not compiled: {reason}. It runs as it is, which takes more memory."]
    right = learned(plain, rows, plain_reference)
    for found in (answers[0], answers[2]):
        assert all(torch.equal(found[name], value) for name, value in right.items() if name not in ("log_prob", "kl"))
        assert torch.equal(found["log_prob"], right["log_prob"])
    assert torch.equal(answers[1], scored(plain, rows))


def test_a_failure_of_a_later_call_ends_no_run(small_language: Build, as_code: Any) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fails_on_many(forward: Forward) -> Forward:
        def code(part: Any, *values: torch.Tensor) -> torch.Tensor:
            if values[0].shape[1] > 40:  # more than the trial has
                raise TorchDynamoException("too many")
            return forward(part, *values)

        return code

    as_code(fails_on_many)
    process, plain = small_language("qwen2", compile=True), small_language("qwen2")
    rows = draw(process)
    answers: list[torch.Tensor] = []
    assert len(warned(lambda: answers.extend([scored(process, rows), scored(process, rows)]))) == 1
    assert all(torch.equal(answer, scored(plain, rows)) for answer in answers)
    cost = process.meter.spent
    scored(process, rows)
    assert process.meter.spent.forward - cost.forward == plain.meter.spent.forward // 2  # a failed call counts once


def test_a_model_without_known_layers_is_not_compiled(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    process = small_language("qwen2", compile=True)
    rows = draw(process)
    for module in process.module.modules():
        vars(module).pop("layer_idx", None)
    monkeypatch.setattr(process.network, "shares", {"score": False})  # which asks for the layers' numbers too
    (heard,) = warned(lambda: scored(process, rows))
    assert "no layers of a known kind" in heard


# the compiler itself


@pytest.mark.slow
@pytest.mark.usefixtures("really_compiled")
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_compiled_scores_and_gradients_are_those_of_the_plain_path(small_language: Build, architecture: str) -> None:
    process, plain = (small_language(architecture, top_p=0.9, compile=given) for given in (True, False))
    rows = draw(process)
    assert float((scored(process, rows) - rows.log_prob).abs().max()) <= tolerance(process.module)
    reference, plain_reference = process.frozen(), plain.frozen()
    with torch.no_grad():
        for first, second in zip(process.module.parameters(), plain.module.parameters(), strict=True):
            second.copy_(first.mul_(1.05))
    same(learned(process, rows, reference), learned(plain, rows, plain_reference), GRADIENT)
    for some in (rows[:1], rows[2:5]):  # a row by itself, and rows of one prompt
        same(learned(process, some), learned(plain, some), GRADIENT)
    assert process.network.compiled is not None
    assert process.network.compiled.agrees == {"score": True, "learn": True}


@pytest.mark.slow
@pytest.mark.usefixtures("really_compiled")
def test_an_adapted_model_is_compiled_with_and_without_its_adapter(small_language: Build, tmp_path: Path) -> None:
    process, plain = (small_language("llama", lora=LORA, compile=given) for given in (True, False))
    rows = draw(process)
    reference, plain_reference = process.frozen(), plain.frozen()
    for one in (process, plain):
        torch.manual_seed(0)
        for parameter in one.module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.1)
    same(learned(process, rows, reference), learned(plain, rows, plain_reference), GRADIENT)
    assert torch.equal(scored(reference, rows), scored(reference, rows))
    assert float((scored(reference, rows) - scored(plain_reference, rows)).abs().max()) <= tolerance(process.module)
    process.save(tmp_path)
    merged = language(tmp_path, device="cpu", max_new_tokens=10)
    assert float((scored(merged, rows) - scored(process, rows)).abs().max()) <= tolerance(process.module)


@pytest.mark.slow
@pytest.mark.usefixtures("really_compiled")
def test_half_precision_is_compiled_too(small_language: Build) -> None:
    process = small_language("qwen2", dtype="bf16", compile=True)
    rows = draw(process)
    assert float((scored(process, rows) - rows.log_prob).abs().max()) < 0.2  # as for a model that is not compiled
    learned(process, rows)
    mixed = small_language("qwen2", compile=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((scored(mixed, rows) - scored(small_language("qwen2"), rows)).abs().max()) < 0.2
        learned(mixed, rows)


@pytest.mark.slow
@pytest.mark.usefixtures("really_compiled")
def test_without_a_compiler_the_model_runs_as_it_is(small_language: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as settings

    process = small_language("qwen2", compile=True)
    rows = draw(process)
    with settings.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        (heard,) = warned(lambda: learned(process, rows))
    assert "compiler" in heard
    assert float((scored(process, rows) - rows.log_prob).abs().max()) <= tolerance(process.module)


@pytest.mark.slow
@pytest.mark.usefixtures("really_compiled")
def test_an_update_does_not_keep_the_activations_of_perceptrons(make_model: Any, make_tokenizer: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    held, layers, wide = {}, 2, 512
    for given in (True, False):
        model = make_model("qwen2", hidden_size=128, intermediate_size=wide, num_hidden_layers=layers)
        process = language(model, make_tokenizer(), device="cpu", max_new_tokens=30, compile=given)
        rows = rollout(process, [Request(Prompt(0, PROMPTS[2]), 16)], Rng(0)).trajectories
        learned(process, rows)
        for _ in range(2):  # the profiler's own first use allocates too
            before = process.meter.spent
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                scores = process.score(rows).log_prob
            events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
            held[given] = sum(event.nbytes() for event in events if event.name() == "[memory]")
            tokens = (process.meter.spent - before).forward
            del scores
    assert held[False] - held[True] >= 4 * layers * tokens * wide  # bytes of what the gate's activation gave


@pytest.mark.slow
def test_a_compiled_run_that_is_resumed_ends_bit_for_bit_alike(model_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def mixed(completions, **columns):\n    return [float(len(set(text))) for text in completions]\n"
    )
    prompts = [json.dumps({"prompt": text}) for text in (*PROMPTS, "b a", "c c c")]
    (tmp_path / "data.jsonl").write_text("\n".join(prompts) + "\n")

    def trained(out: str, *more: str) -> None:
        words = [sys.executable, "-m", "stepwell", "train", "--model", str(model_folder("qwen2")), "--compile"]
        words += ["--data", str(tmp_path / "data.jsonl"), "--reward", f"{tmp_path / 'mine.py'}:mixed"]
        words += ["--learning-rate", "1e-3", "--prompts-per-step", "2", "--group-size", "3", "--max-new-tokens", "9"]
        words += ["--device", "cpu", "--checkpoint-every", "1", "--keep", "100", "--out", str(tmp_path / out), *more]
        done = subprocess.run(words, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        assert "is not compiled" not in done.stderr

    trained("whole", "--steps", "5")
    trained("parts", "--steps", "5", "--budget", "2-steps")
    trained("parts", "--steps", "5", "--resume")
    for name in ("metrics.jsonl", "completions.jsonl", "model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
