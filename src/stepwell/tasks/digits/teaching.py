"""The sizes of the digits task, and the settings that its flow is taught with."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = 10
SHAPE = (1, 8, 8)
NO_LABEL = CLASSES
"""The label that stands for none, which guidance compares with."""


@dataclass(frozen=True)
class Teaching:
    """Settings of the flow's lessons: `steps` batches of `batch` digits, AdamW, the rate falling to 0 as a cosine.

    noise: the share of labels that are replaced at random, anew in each batch. no_label: the share that are left out,
    for guidance.
    """

    noise: float = 0.5
    no_label: float = 0.1
    steps: int = 2500
    batch: int = 256
    learning_rate: float = 3e-3
    width: int = 128
    blocks: int = 2
    embedding: int = 32
    seed: int = 0
