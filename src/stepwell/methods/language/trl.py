"""GRPO as TRL's trainer computes it, option by option, for those who bring a configuration along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from stepwell.credit.group import GroupCredit, Scale
from stepwell.errors import InputError, UnknownName
from stepwell.methods.language.policy_gradient import penalised
from stepwell.objective.gates.step import Gate, HighEntropy, OffPolicyRows, SamplerCorrection
from stepwell.objective.policy import Policy
from stepwell.objective.ratio import LogBound, Ratio
from stepwell.objective.reduction import Mode, Reduction
from stepwell.objective.regularise import Divergence, entropy_bonus
from stepwell.objective.surrogate import Clip, GammaScore, Score, Surrogate, Taper
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method

REDUCTIONS: dict[str, Mode] = {
    "grpo": "row",
    "bnpo": "token",
    "dr_grpo": "fixed",
    "dapo": "token",
    "luspo": "row-sum",
    "cispo": "token",
    "sapo": "row",
    "vespo": "token",
}
"""TRL's loss types, and the way in which each sums its steps up."""
LEVEL = "importance_sampling_level"
RATIOS = {"token": Ratio("token"), "sequence": Ratio("sequence")}
WHOLE = Ratio("sequence", "product", hook=LogBound())
"""vespo's, whatever the level; the bound is TRL's."""
SCALES: dict[str, Scale] = {"group": "std", "batch": "batch-std", "none": "none"}
MODES = {f"{level}_{kind}": (level, kind) for level in ("token", "sequence") for kind in ("truncate", "mask")}
T = TypeVar("T")


def one_of(option: str, name: str, known: Mapping[str, T]) -> T:
    """The part that a value of TRL's option stands for; raises `UnknownName` for a value that TRL does not have."""
    if name not in known:
        raise UnknownName(option, name, known)
    return known[name]


def step_loss(
    loss: str, epsilon: float, high: float | None, delta: float | None, sampler: SamplerCorrection | None
) -> Surrogate:
    """The loss of a step; raises `InputError` for an option that this loss type has no use for."""
    clips = loss not in ("cispo", "sapo", "vespo")
    for option, value, default, used in (
        ("epsilon", epsilon, 0.2, clips),
        ("epsilon_high", high, None, clips or loss == "cispo"),
        ("delta", delta, None, clips),
    ):
        if value != default and not used:
            raise InputError(f"{option} must be left out with loss_type={loss}, where TRL ignores it; got {value}.")
    if loss == "cispo":
        if high is None:
            raise InputError("epsilon_high must be given with loss_type=cispo: it caps the ratio; 5.0 is usual.")
        return Score(maximum=high)
    if loss == "vespo" and sampler is not None and sampler.level == "sequence":
        raise InputError(
            "vllm_importance_sampling_mode must be token by token with loss_type=vespo, whose ratio is a sequence's."
        )
    plain = {"sapo": Taper(), "vespo": GammaScore(sampler=sampler)}
    return plain.get(loss) or Clip(epsilon, epsilon if high is None else high, delta=delta)


def sampler_correction(mode: str | None, maximum: float) -> SamplerCorrection | None:
    """The factor of rows that another sampler drew, where there is one."""
    if mode is None:
        if maximum != 3.0:
            raise InputError(
                "vllm_importance_sampling_clip_max must be left out without a vllm_importance_sampling_mode, such as "
                f"sequence_mask; got {maximum}."
            )
        return None
    level, kind = one_of("vllm_importance_sampling_mode", mode, MODES)
    return SamplerCorrection(level, high=maximum, kind=kind)  # type: ignore[arg-type]


def all_gates(threshold: float | None, spread: tuple[Gate, ...], sampler: SamplerCorrection | None) -> tuple[Gate, ...]:
    """The weights of steps: for rows that the policy has left, for the spread of its distribution, for the sampler."""
    stale = () if threshold is None else (OffPolicyRows(threshold),)
    return (*stale, *spread, *(() if sampler is None else (sampler,)))


@method(
    "trl-grpo",
    title="TRL's GRPO trainer",
    paper="TRL: Transformer Reinforcement Learning, GRPOTrainer",
    year=2026,
    differs="grpo with the options of TRL 1.16's GRPOConfig, by their names and with their defaults.",
    when="To run or reproduce a configuration of TRL's GRPO trainer, option by option.",
    note="Equal to TRL's loss and gradient to 1e-10 for every loss type, level and option here. TRL's bnpo is that of "
    "one micro-batch, with other values when rows are cut otherwise; cispo's epsilon_high is the cap itself. Options "
    "that TRL would ignore for a loss type are refused. Not here: the shapes of sapo and vespo (methods of their "
    "own), adaptive entropy, masked truncation, and what is no loss: engines, schedules, logging.",
    proof=("standardised_gradient", "stated_slopes"),
)
def trl_grpo(
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    scale_rewards: str = "group",
    num_iterations: int = 1,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    off_policy_mask_threshold: float | None = None,
    vllm_importance_sampling_mode: str | None = None,
    vllm_importance_sampling_clip_max: float = 3.0,
) -> Recipe:
    mode, ratio = one_of("loss_type", loss_type, REDUCTIONS), one_of(LEVEL, importance_sampling_level, RATIOS)
    sampler = sampler_correction(vllm_importance_sampling_mode, vllm_importance_sampling_clip_max)
    surrogate = step_loss(loss_type, epsilon, epsilon_high, delta, sampler)
    spread = (HighEntropy(top_entropy_quantile),) if top_entropy_quantile != 1 else ()
    gates = all_gates(off_policy_mask_threshold, spread, None if loss_type == "vespo" else sampler)
    divergence = Divergence("k3-weighted", ratio=ratio) if use_bias_correction_kl else Divergence("k3")
    credit = GroupCredit("mean", one_of("scale_rewards", scale_rewards, SCALES))
    policy = Policy(credit, WHOLE if loss_type == "vespo" else ratio, surrogate, gates, Reduction(mode))
    objective = penalised(policy, beta, divergence, mode)
    return Recipe(objective + entropy_bonus(entropy_coef, spread) if entropy_coef else objective, epochs=num_iterations)
