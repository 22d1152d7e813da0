"""TRL's GRPO trainer and our process on the same random model, for the language benchmark."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback

import stepwell
from stepwell import Prompt, Request, Rng, language, rollout


@dataclass(frozen=True)
class Shape:
    """A model and a batch: `prompts` different ones of `length` tokens, each `group` times, `new` tokens a row."""

    length: int
    new: int
    group: int
    prompts: int
    vocabulary: int = 8_192
    hidden: int = 512
    layers: int = 8

    @property
    def rows(self) -> int:
        return self.prompts * self.group


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    backend = Tokenizer(models.WordLevel(known, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(shape: Shape) -> Any:
    """A Qwen2 with random weights, in the proportions of small models that people train."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(shape.hidden // 256, 1),
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """A number that differs within a group: the count of different words in a completion."""
    return [float(len(set(text.split()))) for text in completions]


class Clock(TrainerCallback):
    """The seconds of each step of TRL's trainer, its rollout included."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self.now() - self.begin)


class PeerAndOurs:
    """The peer and ours, each with its own copy of one model."""

    def __init__(self, shape: Shape, now: Callable[[], float], compile: bool = False):
        self.shape, self.clock = shape, Clock(now)
        self.words, network = tokenizer(shape.vocabulary), model(shape)
        span = shape.vocabulary - 2
        self.texts = [
            " ".join(f"w{2 + (7_919 * i + 31 * j) % span}" for j in range(shape.length)) for i in range(shape.prompts)
        ]
        self.network = copy.deepcopy(network)
        self.process = language(network, self.words, max_new_tokens=shape.new, device="cpu", compile=compile)
        self.trainer = self._trainer()

    def _trainer(self) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        shape = self.shape
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=shape.rows,
            num_generations=shape.group,
            max_completion_length=shape.new,
            gradient_checkpointing=False,  # it saves memory for time; neither side does
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            max_steps=2,
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = Dataset.from_list([{"prompt": text} for text in self.texts])
        with quiet():
            return GRPOTrainer(
                self.network, reward, settings, data, processing_class=self.words, callbacks=[self.clock]
            )

    # a rollout: tokenised, drawn, decoded

    def peer_rollout(self) -> None:
        with quiet():
            self.trainer._generate([text for text in self.texts for _ in range(self.shape.group)])

    def requests(self) -> list[Request]:
        return [Request(Prompt(i, text), self.shape.group) for i, text in enumerate(self.texts)]

    def our_rollout(self) -> Any:
        return rollout(self.process, self.requests(), Rng(0))

    # whole steps

    def peer_steps(self) -> list[float]:
        self.clock.seconds.clear()
        with quiet():
            self.trainer.train()
        return list(self.clock.seconds)

    def our_steps(self) -> list[float]:
        seconds = [self.clock.now()]
        stepwell.train(
            self.process,
            [{"prompt": text} for text in self.texts],
            reward,
            method="grpo",
            steps=2,
            prompts_per_step=self.shape.prompts,
            group_size=self.shape.group,
            on_step=lambda metrics: seconds.append(self.clock.now()),
        )
        return [end - begin for begin, end in itertools.pairwise(seconds)]  # the first includes the preparations

    # log-probabilities and their gradient, of the same rows

    def scored(self) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
        """The peer's, ours and plain logits' log-probabilities with their gradient, each to be called."""
        shape, rows = self.shape, self.our_rollout().trajectories
        prompts = torch.tensor([self.words(text)["input_ids"] for text in self.texts])
        ids = torch.cat([prompts.repeat_interleave(shape.group, 0), rows.action], 1)
        real = torch.cat([torch.ones_like(ids[:, : shape.length]), rows.mask.long()], 1)
        keep = rows.action.shape[1]

        def peer() -> None:
            self.network.zero_grad()
            answer = self.trainer._get_per_token_logps_and_entropies(
                self.network, ids, real, keep, compute_entropy=True
            )
            answer[0].sum().backward()

        def ours() -> None:
            self.process.module.zero_grad()
            self.process.score(rows).log_prob.sum().backward()

        def plain() -> None:
            self.network.zero_grad()
            logits = self.network(ids, attention_mask=real, logits_to_keep=keep + 1).logits[:, :-1]
            logits.log_softmax(-1).gather(-1, rows.action[..., None]).sum().backward()

        return peer, ours, plain


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the trainer's output and warnings, which are not results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held beyond those before, from every allocation and release."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
