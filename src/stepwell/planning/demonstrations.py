"""Groups in which the data have a say: beside a prompt's samples stands what another wrote for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.groups import Groups
from stepwell.sampling.request import Completion, Request


@dataclass
class Demonstrated(Groups):
    """`size` samples a prompt, and one row of source 1: the completion in the data's column `column`.

    A demonstration is judged by the reward like any sample, and its log-probability under whoever wrote it is taken
    for 0, probability 1. Raises `InputError` for a prompt without one.
    """

    column: str = "demonstration"

    def ask(self, prompts: PromptStream, count: int, weights: Tensor | None = None) -> list[Request]:
        requests = []
        for request in super().ask(prompts, count, weights):
            written = request.prompt.columns.get(self.column)
            if written is None:
                raise InputError(
                    f"Prompt {request.prompt.id} has no '{self.column}'; the data need that column, with a completion "
                    "in every row, for a method that learns from demonstrations."
                )
            requests += [request, Request(request.prompt, 1, start=Completion(written), source=1)]
        return requests
