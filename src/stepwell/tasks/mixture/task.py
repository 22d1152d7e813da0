"""The mixture task: a flow with a known start and a known KL-regularised optimum, so that a plot shows the truth."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from stepwell.errors import InputError
from stepwell.tasks.registry import Task, task

if TYPE_CHECKING:  # tasks are listed without torch
    from stepwell.process.base import Process
    from stepwell.sampling.request import Prompt

PROMPTS = 64
SETTINGS: dict[str, Any] = {"learning_rate": 2e-3, "prompts_per_step": 16, "group_size": 16}
"""Training settings under which a policy gradient is most of the way after ten seconds on one core."""


@task("mixture")
def mixture(
    modes: int = 6,
    strength: float = 1.0,
    beta: float = 1.0,
    solver: str = "dpmpp-2m",
    steps: int = 12,
    evaluation: int = 128,
    seed: int = 0,
) -> Task:
    """Points in the plane: a flow of known distribution, drawn towards a target, with its optimum in closed form.

    The start is a ring of `modes` Gaussians, the reward -`strength` |x - target|^2 / 2, and `beta` the weight of the KL
    in the optimum that samples are compared with. Samples are judged by `solver` in `steps` steps; a method chooses its
    own sampler to train with. Prompts are numbers without a meaning, `evaluation` of them held out; `seed` draws the
    weights.
    """
    from stepwell.reward.mixing import Rewards
    from stepwell.sampling.request import Prompt
    from stepwell.tasks.mixture.picture import figure
    from stepwell.tasks.mixture.problem import CorrectedVelocity, mixture_problem

    problem = mixture_problem(modes, strength, beta)
    if evaluation < 1:
        raise InputError(f"evaluation of task mixture must be at least 1, got {evaluation}.")

    def process() -> Process:
        from stepwell.process.flow.build import flow
        from stepwell.rng import Rng
        from stepwell.solver.path import Linear

        network = CorrectedVelocity(problem.start, Linear(), Rng(seed).split("weights"))
        return flow(network, (2,), solver=solver, steps=steps)

    return Task(
        name="mixture",
        title="Mixture",
        description=(
            f"Points from a ring of {modes} Gaussians, rewarded by -{strength:g} |x - target|² / 2. The optimum at a "
            f"KL weight of {beta:g} is known: its reward is {problem.optimum.reward:.3f} and its KL from the start "
            f"{problem.optimum.kl:.2f} nats; the start's reward is {problem.reward.expected(problem.start):.3f}. "
            "A reward above that of the optimum costs more KL than it is worth."
        ),
        process=process,
        prompts=[Prompt(number, number) for number in range(PROMPTS)],
        evaluation=[Prompt(number, number) for number in range(PROMPTS, PROMPTS + evaluation)],
        rewards=Rewards(problem.closeness),
        settings=SETTINGS,
        show=show,
        unit="reward",
        threads=1,
        measures={
            "distance to the optimum (lower is better)": problem.distance,
            "distance to the start": problem.departure,
        },
        figure=partial(figure, problem),
        caption="Contours hold half and nine tenths of the start (thin) and of the optimum (strong). Cross: target. "
        "Numbers: the distance to the optimum, above zero for as many perfect samples, too.",
    )


def show(prompt: Prompt, completion: Any) -> str:
    """A point as a report prints it."""
    return f"({float(completion[0]):.2f}, {float(completion[1]):.2f})"
