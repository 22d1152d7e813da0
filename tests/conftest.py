"""Small random language models and tokenizers, built on the spot and loaded by the real loading code; and programs."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepwell.cli import main
from stepwell.process.language.build import language
from stepwell.process.language.process import Language

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background would ignore Ctrl-C
torch.set_num_threads(1)  # the tensors are small: threads that wait for each other make tests ten times slower


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Models that transformers fills at random are the same whichever tests ran before."""
    torch.manual_seed(0)


WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z".split()
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(*, pad: bool = True, eos: bool = True, chat: bool = False) -> Any:
    """A tokenizer of single letters and a few special tokens, 34 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<turn>", "<user>", "<assistant>", "<system>", "."]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>"} if pad else {}
    options |= {"eos_token": "<eos>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def small_model(architecture: str, **changes: Any) -> Any:
    """A random model with weights large enough that its distributions are far from uniform."""
    import transformers as t

    size = {"vocab_size": 34, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    common = size | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common |= {"intermediate_size": 48, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if architecture == "gpt2":
            config: Any = t.GPT2Config(
                **(size | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | changes)
            )
            model: Any = t.GPT2LMHeadModel(config)
        elif architecture == "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**(common | changes)))
        elif architecture == "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**(common | changes)))
        elif architecture == "gemma2":
            extra = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
            model = t.Gemma2ForCausalLM(t.Gemma2Config(**(common | extra | changes)))
        elif architecture == "granite":
            model = t.GraniteForCausalLM(t.GraniteConfig(**(common | {"logits_scaling": 0.5} | changes)))
        elif architecture == "cohere":
            model = t.CohereForCausalLM(t.CohereConfig(**(common | {"logit_scale": 2.0} | changes)))
        elif architecture == "bloom":  # no position ids, no key-value groups
            model = t.BloomForCausalLM(t.BloomConfig(**(size | {"hidden_size": 32, "n_layer": 2, "n_head": 4})))
        else:
            raise ValueError(architecture)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a small model and its tokenizer, one for each architecture and kind of tokenizer."""
    made: dict[Any, Path] = {}

    def build(architecture: str = "qwen2", chat: bool = False, **changes: Any) -> Path:
        key = (architecture, chat, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture)
            small_model(architecture, **changes).save_pretrained(made[key])
            word_tokenizer(chat=chat).save_pretrained(made[key])
        return made[key]

    return build


@pytest.fixture
def small_language(model_folder: Callable[..., Path]) -> Callable[..., Language]:
    """A small language model, loaded from its folder: `small_language("gpt2", temperature=0.7)`."""

    def build(architecture: str = "qwen2", chat: bool = False, **options: Any) -> Language:
        return language(model_folder(architecture, chat), **({"max_new_tokens": 10, "device": "cpu"} | options))

    return build


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """`make_model("gpt2", **config)`: a small model in memory."""
    return small_model


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(pad=True, eos=True, chat=False)`."""
    return word_tokenizer


class Program:
    """A program that was started by `start`: its exit code (negative: the signal that ended it) and its output."""

    def __init__(self, process: Any, stdout: Path, stderr: Path):
        self.process, self._stdout, self._stderr = process, stdout, stderr

    def wait(self, seconds: float = 240.0) -> Program:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"not done after {seconds} seconds"
        return self

    @property
    def returncode(self) -> int:
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()


@pytest.fixture(scope="session")
def server() -> Any:
    """Processes are forked from one that has imported everything: seconds less each, and no thread of the tests'."""
    context = multiprocessing.get_context("forkserver")
    ours = ["stepwell.cli.train", "stepwell.cli.lists", "stepwell.api", "stepwell.check.methods"]
    theirs = ["modeling_utils", "models.auto.modeling_auto", "models.qwen2.modeling_qwen2"]
    context.set_forkserver_preload([*ours, *(f"transformers.{module}" for module in theirs)])
    return context


@pytest.fixture
def start(server: Any, tmp_path: Path) -> Callable[..., Program]:
    """`start("stepwell", "methods")` or `start("script.py", "word")`: a program of its own, which `wait` waits for."""
    programs: list[Program] = []

    def begin(
        *words: str,
        environment: Mapping[str, str] | None = None,
        folder: Path = tmp_path,
        paths: Sequence[str] = (),
        stdout: Path | None = None,
    ) -> Program:
        out = stdout or tmp_path / f"stdout-{len(programs)}"
        error = tmp_path / f"stderr-{len(programs)}"
        given = {"words": words, "environment": {**os.environ, **(environment or {})}, "folder": folder}
        given |= {"paths": list(paths), "stdout": out, "stderr": error}
        file = str(Path(__file__).with_name("program.py"))
        process = server.Process(target=runpy.run_path, args=(file, {"given": given}, "__main__"), daemon=True)
        programs.append(Program(process, out, error))
        process.start()
        return programs[-1]

    return begin


@pytest.fixture
def launch(start: Callable[..., Program], tmp_path: Path) -> Callable[..., None]:
    """`launch(script, *words)`: run a script as two ranks that communicate through gloo."""

    def run(script: str, *words: str) -> None:
        (tmp_path / "script.py").write_text(script)
        given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 2000)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        for program in [start("script.py", *words, environment=given | rank) for rank in ranks]:
            assert program.wait().returncode == 0, program.stderr

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("train", ...)`: the one line, a sentence or more, that a command is refused with."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("stepwell: ")
        assert shown.err.count("\n") == 1
        assert shown.err.endswith((".\n", "?\n"))
        assert "Traceback" not in shown.err + shown.out
        return shown.err

    return run
