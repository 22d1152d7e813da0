"""Groups with a demonstration: beside a prompt's samples stands a completion from the data."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.data.stream import PromptStream
from stepwell.errors import InputError
from stepwell.planning.groups import Groups
from stepwell.sampling.request import Completion, Request
from stepwell.tensors import Tensor


@dataclass
class Demonstrated(Groups):
    """`size` samples a prompt, and one row of source 1: the completion in the data's column `column`.

    A demonstration is judged by the reward like any sample, and its stored log-probability is 0, that of certainty.
    Raises `InputError` for a prompt without one.
    """

    column: str = "demonstration"

    def ask(self, prompts: PromptStream, count: int, weights: Tensor | None = None) -> list[Request]:
        requests = []
        for request in super().ask(prompts, count, weights):
            completion = request.prompt.columns.get(self.column)
            if completion is None:
                raise InputError(
                    f"Demonstrated.column must be a column of the data with a completion in every row, got "
                    f"'{self.column}', which prompt {request.prompt.id} has not."
                )
            requests += [request, Request(request.prompt, 1, start=Completion(completion), source=1)]
        return requests
