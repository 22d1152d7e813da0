"""Policy gradients on the steps of a flow or diffusion: each step is an action with a density."""

from __future__ import annotations

from stepwell.credit.group import GroupCredit
from stepwell.credit.shaping import Bounded, DivergencePenalty, Outcome
from stepwell.methods.flow.samplers import ancestral, flow_sde, noisy
from stepwell.methods.flow.variants import CPS, FIRST, KL, RATIO, clipped, near, published
from stepwell.objective.flow.gaussian import DivergenceBound, PerStepSize, RegulatedRatio
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.surrogate import Clip, Plain, Score
from stepwell.planning.groups import Groups
from stepwell.planning.windows import Windows
from stepwell.ranges import NotNegative, Size
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method
from stepwell.steering.guide import RewardGuide


@method(
    "ddpo-sf",
    title="Denoising Diffusion Policy Optimization, score function",
    paper="Training Diffusion Models with Reinforcement Learning",
    arxiv="2305.13301",
    year=2023,
    processes=("flow",),
    differs="REINFORCE on denoising steps drawn as DDPM draws them; rewards standardised within the prompt.",
    when="The plainest method for diffusion models: any reward, one update a rollout.",
    proof=("gaussian_gradient", "policy_moment_gradient"),
)
def ddpo_sf(steps: Size = 10, eta: NotNegative = 1.0) -> Recipe:
    credit = Bounded(GroupCredit("mean", "std"), 10.0)
    policy = Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "ddpo-is",
    title="Denoising Diffusion Policy Optimization, importance sampling",
    aliases=("ddpo",),
    paper="Training Diffusion Models with Reinforcement Learning",
    arxiv="2305.13301",
    year=2023,
    processes=("flow",),
    differs="ddpo-sf with a clipped ratio a step; published: of mean log-densities, clipped at 1e-4.",
    when="As ddpo-sf, when each rollout serves several updates.",
    note=f"As published, {RATIO}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def ddpo_is(steps: Size = 10, eta: NotNegative = 1.0, clip: float | None = None, variant: str = "corrected") -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "std"), 10.0))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "loop",
    title="LOOP",
    paper="A Simple and Effective Reinforcement Learning Method for Text-to-Image Diffusion Fine-tuning",
    arxiv="2503.00897",
    year=2025,
    catalogue=126,
    processes=("flow",),
    differs="ddpo-is with the mean reward of a prompt's other samples as each one's baseline.",
    when="For diffusion models with several samples a prompt: ddpo-is with less variance.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def loop(steps: Size = 10, eta: NotNegative = 1.0, clip: float = 0.2) -> Recipe:
    policy = clipped("corrected", clip, GroupCredit("leave-one-out"), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=ancestral(eta, steps))


@method(
    "flow-grpo",
    title="Flow-GRPO",
    paper="Flow-GRPO: Training Flow Matching Models via Online RL",
    arxiv="2505.05470",
    year=2025,
    processes=("flow",),
    differs="GRPO on the steps of an SDE with the flow's marginals; `window` > 0 is Fast, random steps there alone.",
    when="The usual choice for flow-matching models and rewards without a gradient.",
    note=f"As published, {RATIO}; {FIRST}; {KL}; {CPS}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio", "step_divergence"),
)
def flow_grpo(
    level: NotNegative = 0.7,
    steps: Size = 10,
    clip: float | None = None,
    kl: NotNegative = 0.0,
    window: int = 0,
    noise: str = "sde",
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "batch-std"), 5.0))
    planner = Windows(steps=steps - 1, width=window or steps - 1, schedule="random" if window else "fixed")
    return Recipe(near(policy, kl, variant), planner, sampler=noisy(noise, level, steps, variant))


@method(
    "dance-grpo",
    title="DanceGRPO",
    paper="DanceGRPO: Unleashing GRPO on Visual Generation",
    arxiv="2505.07818",
    year=2025,
    processes=("flow",),
    differs="flow-grpo with noise of constant size, standardised within the group, a prompt's samples from one noise.",
    when="For image and video models, when the samples of a prompt should start from the same noise.",
    note=f"As published, {RATIO}.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio"),
)
def dance_grpo(
    level: NotNegative = 0.3,
    steps: Size = 16,
    clip: float | None = None,
    same_noise: bool = True,
    variant: str = "corrected",
) -> Recipe:
    policy = clipped(variant, clip, Bounded(GroupCredit("mean", "std"), 5.0))
    planner = Windows(steps=steps - 1, width=steps - 1, same_noise=same_noise)
    return Recipe(policy, planner, sampler={"solver": "sde-dance", "level": level, "steps": steps})


@method(
    "euphonium",
    title="Euphonium",
    paper="Euphonium: Steering Video Flow Matching via Process Reward Gradient Guided Stochastic Dynamics",
    arxiv="2602.04928",
    year=2026,
    catalogue=386,
    processes=("flow",),
    differs="dance-grpo on rollouts guided by the reward's gradient, which the policy absorbs; scored under its own "
    "unguided distribution, as a guided centre would leave it in need of the reward.",
    when="When the reward has a gradient to draw better samples with, and the model should learn to do without it.",
    proof=("guided_step",),
)
def euphonium(
    level: NotNegative = 0.3,
    steps: Size = 16,
    beta: float = 0.1,
    scale: NotNegative = 0.1,
    clip: float | None = None,
    variant: str = "corrected",
) -> Recipe:
    guide = RewardGuide(scale, normalise=True) if published(variant) else RewardGuide(beta=beta)
    return dance_grpo(level, steps, clip, same_noise=False, variant=variant).replace(guide=guide)


@method(
    "grpo-guard",
    title="GRPO-Guard",
    paper="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
    arxiv="2510.22319",
    year=2025,
    catalogue=16,
    processes=("flow",),
    differs="flow-grpo with a ratio freed of its bias and of each step's scale, and steps reweighted by 1 / |dt|.",
    when="When flow-grpo over-optimises: its clip binds at some steps and hardly at others.",
    proof=("gaussian_gradient", "policy_moment_gradient", "regulated_ratio", "step_divergence"),
)
def grpo_guard(
    level: NotNegative = 0.7, steps: Size = 10, clip: float = 2e-3, reweight: bool = True, kl: NotNegative = 0.0
) -> Recipe:
    recipe = flow_grpo(level, steps, kl=kl)
    gates = (PerStepSize(),) if reweight else ()
    return recipe.replace(ratio=RegulatedRatio(), surrogate=Clip(clip, clip), gates=gates)


@method(
    "flow-dppo",
    title="Flow-DPPO",
    processes=("flow",),
    differs="flow-grpo whose clip is a bound on each step's divergence from the old policy instead of on its ratio.",
    when="When a bound on how far each step moves says more than one on its ratio.",
    proof=("gaussian_gradient", "policy_moment_gradient", "mean_ratio", "divergence_bound"),
)
def flow_dppo(level: NotNegative = 0.7, steps: Size = 10, threshold: float = 1e-4) -> Recipe:
    return flow_grpo(level, steps).replace(surrogate=Plain(), gates=(DivergenceBound(threshold),))


@method(
    "ctrl",
    title="CTRL",
    paper="Adding Conditional Control to Diffusion Models with Reinforcement Learning",
    arxiv="2406.12120",
    year=2024,
    catalogue=22,
    processes=("flow",),
    differs="REINFORCE on the reward less `kl` times the path's divergence: with many steps its optimum is the tilt.",
    when="When the target is the model tilted by the reward, such as the log-probability of a condition.",
    proof=("gaussian_gradient", "path_divergence"),
)
def ctrl(kl: NotNegative = 0.1, level: NotNegative = 0.7, steps: Size = 10) -> Recipe:
    credit = GroupCredit("leave-one-out", reward=Outcome() + DivergencePenalty(kl))
    policy = Policy(credit, surrogate=Score(), reduction=Reduction("row-sum"))
    return Recipe(policy, Groups(), sampler=flow_sde(level, steps, "corrected"))
