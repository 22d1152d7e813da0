"""Every registered method obeys the laws of methods and its own oracle; mistakes planted in each folder are caught."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, fields, is_dataclass
from typing import get_type_hints

import pytest
import torch

from stepwell import methods
from stepwell.batch import Read
from stepwell.check.methods import bench, check_method, gradient
from stepwell.check.oracles import policy_gradient as oracles
from stepwell.check.oracles.provable import variants
from stepwell.credit.group import GroupCredit
from stepwell.credit.traces import GeneralisedAdvantage, Whitened
from stepwell.errors import InputError, LawBroken, UnknownName
from stepwell.objective.flow.forward import DirectReward, NegativeAware
from stepwell.objective.flow.gaussian import NoiseAware
from stepwell.objective.gates.selection import MostSpread
from stepwell.objective.gates.step import Gate
from stepwell.objective.policy import Policy
from stepwell.objective.reduction import Reduction
from stepwell.objective.regularise import Divergence, Regulariser
from stepwell.objective.state import Ramp
from stepwell.objective.surrogate import Clip, Score
from stepwell.objective.term import Loss
from stepwell.parts import Part
from stepwell.planning.groups import DynamicSampling
from stepwell.ranges import Checked
from stepwell.recipe.card import Card
from stepwell.recipe.recipe import Recipe

OTHER: dict[str, object] = {
    "keep": "above-mean",
    "pairs": "mean",
    "kl": 0.3,
    "entropy": 0.1,
    "length": 7,
    "smoothing": 0.2,
    "variant": "published",
    "schedule": "random",
    "solver": "ddpm",
    "weight": "time",
    "go_on": "best",
    "noise": "cps",
    "branches": 4,
    "loss": "ipo",
    "divergence": "forward-kl",
    "semantics": ("trl", "verl"),
    "loss_type": "sapo",
    "importance_sampling_level": "sequence",
    "epsilon_high": 0.28,
    "delta": 3.5,
    "top_entropy_quantile": 0.5,
    "scale_rewards": "batch",
    "off_policy_mask_threshold": 0.5,
    "vllm_importance_sampling_mode": "token_mask",
    "anchor": "down",
    "reference": "synced",
    "estimate": "k3",
    "tail": 0.3,
}
"""What options are changed to where twice the default is not a choice, or one of several."""

BESIDE: dict[str, dict[str, object]] = {
    "semantics": {"kl": 0.1},
    "use_bias_correction_kl": {"beta": 0.1},
    "vllm_importance_sampling_clip_max": {"vllm_importance_sampling_mode": "token_mask"},
}
"""Options without which another means nothing."""
SHARES = ("gamma", "lam", "decay", "least")
"""Options of which twice the default may be more than there is: half of it is tried."""

TEN = "cispo dapo dpo dr-grpo gspo grpo ppo raft reinforce rloo".split()


def card(recipe, *proof, processes=("language",)):
    return Card("planted", "A planted mistake", lambda: recipe, proof=proof, processes=processes)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_obeys_the_laws_of_methods_and_its_oracle(name):
    found = methods.get(name)
    assert found.proof, "a method without a proof is not a method of ours"
    report = check_method(found)
    assert max(report[f"oracle {name}"] for name in found.proof) < 1e-12  # rounding, and no more


@pytest.mark.parametrize("name", [name for name in methods.names() if "variant" in methods.get(name).options])
def test_a_published_variant_obeys_the_laws_of_methods_too(name):
    found = methods.get(name)
    published = dataclasses.replace(found, build=functools.partial(found.build, variant="published"), proof=())
    assert published.recipe() != found.recipe()
    check_method(published)


def test_the_ten_methods_of_the_first_release_are_there():
    assert set(TEN) <= set(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_about_ten_lines(name):
    import inspect

    body = inspect.getsource(methods.get(name).build).split("-> Recipe:")[1].strip().splitlines()
    assert len(body) <= 10


@pytest.mark.parametrize("name", methods.names())
def test_an_unknown_option_of_a_method_names_the_nearest(name):
    found = methods.get(name)
    option = next(iter(found.options))
    with pytest.raises(UnknownName, match=f"did you mean '{option}'"):
        found.recipe(**{option + "x": 1})


@pytest.mark.parametrize("name", methods.names())
def test_every_option_of_a_method_changes_its_parts(name):
    found = methods.get(name)
    for option, value in found.options.items():
        assert not isinstance(value, str) or option in OTHER, f"say in OTHER what else '{option}' of {name} may be"
        larger = value * 2 if value else 1
        if option in SHARES and value:
            larger = (value // 2 or 2) if isinstance(value, int) else value / 2
        changed = (not value) if isinstance(value, bool) else OTHER.get(option, larger)
        choices = [choice for choice in (changed if isinstance(changed, tuple) else (changed,)) if choice != value]
        ways = [{}] if option == "variant" else list(variants(found))
        beside = {other: value for other, value in BESIDE.get(option, {}).items() if other in found.options}
        ways = [{**way, **beside} for way in ways]
        used = any(differs(found, way, option, choice) for way in ways for choice in choices)
        assert used, f"option '{option}' of {name} is not used"


def differs(found, way, option, choice):
    """Whether a method is another with an option changed; a choice that it does not have makes no difference."""
    try:
        return found.recipe(**way, **{option: choice}) != found.recipe(**way)
    except InputError:
        return False


def test_the_types_of_every_part_can_be_read():
    """Else its numbers and choices would go unchecked, without a word."""

    def below(kind):
        return {kind, *(each for child in kind.__subclasses__() for each in below(child))}

    own = {kind for kind in below(Checked) if kind.__module__.startswith("stepwell.")}
    assert len(own) > 80
    for kind in filter(is_dataclass, own):
        assert set(get_type_hints(kind)) >= {entry.name for entry in fields(kind)}


def test_a_state_begins_with_a_number_that_its_part_may_have():
    MostSpread(share=Ramp("rows", 0.5))
    with pytest.raises(
        InputError, match=r"MostSpread.share must be a number above 0 and at most 1, .* that begins at -1"
    ):
        MostSpread(share=Ramp("rows", -1))
    with pytest.raises(InputError, match=r"MostSpread.share must be a number above 0 and at most 1, .* got None"):
        MostSpread(share=None)


@dataclass(frozen=True)
class LocalReduction(Part):
    """The mistake of dividing by the counts of the micro-batch."""

    def __call__(self, batch):
        return batch.mask / batch.mask.sum()


@dataclass(frozen=True)
class LocalPolicy(Policy):
    """The mistake of computing the weights from whatever rows are at hand."""

    def loss(self, batch, targets):
        return super().loss(batch, {**targets, "weight": LocalReduction()(batch)})


@dataclass(frozen=True)
class PaddedMean(Part):
    """The mistake of dividing by the padded width."""

    def __call__(self, batch):
        return batch.mask / batch.mask.numel()


@dataclass(frozen=True)
class FirstRow(Part):
    """The mistake of centring on whatever row comes first."""

    def __call__(self, batch):
        return batch.reward - batch.reward[0]


@dataclass(frozen=True)
class LocalQuantile(Gate):
    """The mistake of taking a quantile inside a micro-batch."""

    when = "step"

    def __call__(self, batch, log_ratio, advantage):
        return (batch.log_prob >= batch.log_prob[batch.rows.mask].median()).to(batch.mask.dtype)


@dataclass(frozen=True)
class LocalWhitening(Policy):
    """The mistake of whitening advantages per micro-batch."""

    def loss(self, batch, targets):
        advantage = targets["advantage"]
        return super().loss(batch, {**targets, "advantage": (advantage - advantage.mean()) / (advantage.std() + 1e-8)})


@dataclass(frozen=True)
class WrongClip(Clip):
    """The mistake of taking the maximum of the two branches."""

    def __call__(self, log_ratio, advantage, batch):
        ratio = log_ratio.exp()
        return -torch.maximum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * (1 + 1e-3 * log_ratio)


@pytest.mark.parametrize(
    ("planted", "law"),
    [
        (LocalPolicy(), "micro-batches"),
        (Policy(reduction=PaddedMean()), "padding"),
        (Policy(FirstRow()), "permutation"),
        (Policy(gates=(LocalQuantile(),)), "micro-batches"),
        (LocalWhitening(), "padding|micro-batches"),
    ],
)
def test_a_planted_mistake_breaks_the_law_it_should(planted, law):
    with pytest.raises(LawBroken, match=law):
        check_method(card(Recipe(planted)))


@dataclass(frozen=True)
class LocalNoise(NoiseAware):
    """The mistake of averaging the noise over a micro-batch."""

    when = "step"

    def __call__(self, batch, log_ratio, advantage):
        deviation = batch.field("old_deviation") * batch.mask
        return deviation * batch.mask.sum() / deviation.sum()


@dataclass(frozen=True)
class LocalReward(DirectReward):
    """The mistake of taking the mean reward of a micro-batch."""

    def loss(self, batch, targets):
        return Loss(-batch.judge(batch.present("sample"), batch.rows.prompt).mean())


@dataclass(frozen=True)
class LastColumn(NegativeAware):
    """The mistake of taking what is in the last column for a row's sample."""

    def loss(self, batch, targets):
        ends = batch.rows.action[:, -1].square().sum(1, keepdim=True)
        return super().loss(batch, {"good": targets["good"] * ends[:, 0]})


@pytest.mark.parametrize(
    ("name", "planted", "law"),
    [
        ("tempflow-grpo", Policy(gates=(LocalNoise(),)), "micro-batches"),
        ("draft-k", LocalReward(1), "micro-batches"),
        ("diffusion-nft", LastColumn(), "padding"),
    ],
)
def test_a_mistake_planted_in_a_flow_method_breaks_the_law_it_should(name, planted, law):
    recipe = dataclasses.replace(methods.get(name).recipe(), objective=planted)
    with pytest.raises(LawBroken, match=law):
        check_method(card(recipe, processes=("flow",)))


@pytest.mark.parametrize(
    ("planted", "oracle"),
    [
        (Policy(GroupCredit("mean"), surrogate=Score(), reduction=Reduction("row-sum")), "exact_gradient"),
        (Policy(GroupCredit("mean", "std", ddof=0), reduction=Reduction("row")), "standardised_gradient"),
        (Policy(GroupCredit("mean", "std"), reduction=Reduction("row-sum")), "length_weighted_gradient"),
        (Policy(GroupCredit("leave-one-out"), reduction=Reduction("fixed")), "mean_centred_gradient"),
        (Policy(GroupCredit("mean", "batch-std"), reduction=Reduction("row")), "first_update_of_grpo"),
    ],
)
def test_a_wrong_composition_fails_the_oracle_it_should(planted, oracle):
    with pytest.raises(LawBroken, match=oracle):
        check_method(card(Recipe(planted), oracle))


def test_a_planner_that_keeps_dead_groups_fails_the_refill_oracle():
    @dataclass
    class Keeps(DynamicSampling):
        def plan(self, step, so_far, prompts):
            return [] if so_far is not None else super().plan(step, so_far, prompts)

    recipe = dataclasses.replace(methods.get("dapo").recipe(), planner=Keeps())
    assert oracles.refilled_gradient(methods.get("dapo")) < 1e-10
    assert oracles.refilled_gradient(card(recipe)) > 0.01


def test_a_baseline_that_sees_the_action_fails_its_oracle():
    @dataclass(frozen=True)
    class Late(GeneralisedAdvantage):
        def __call__(self, batch):
            after = torch.roll(batch.field("value"), -1, 1)
            return (batch.reward[:, None] - after) * batch.mask

    good = methods.get("ppo")
    planted = Card("planted", "", lambda lam=1.0: Recipe(Policy(Whitened(Late(lam=lam)))), proof=())
    assert oracles.exact_critic_gradient(good) < 1e-10
    assert oracles.exact_critic_gradient(planted) > 0.01


def test_a_wrong_clip_fails_the_one_token_oracle():
    planted = Card(
        "planted", "", lambda low=0.2, high=0.2: methods.get("gspo").recipe().replace(surrogate=WrongClip()), proof=()
    )
    assert oracles.one_token_is_ppo(planted) > 1e-4


def test_a_whole_group_that_does_not_fit_a_micro_batch_is_exact_through_its_scores():
    recipe = methods.get("dpo").recipe(pairs="all")
    process, rows = bench(recipe)
    whole = gradient(process, recipe, rows)
    assert torch.allclose(gradient(process, recipe, rows, tokens=1), whole, rtol=0, atol=1e-12)


def test_a_divergence_penalty_reads_the_reference_and_only_then():
    assert Read("reference", "log_prob") not in methods.get("grpo").recipe().whole.reads
    assert Read("reference", "log_prob") in methods.get("grpo").recipe(kl=0.1).whole.reads
    assert (Policy() + Regulariser(Divergence("exact"))).needs == {"kl"}


def test_a_recipe_replaces_parts_by_name_and_refuses_others():
    recipe = methods.get("grpo").recipe()
    assert recipe.replace(surrogate=Clip(0.1, 0.1)).whole.terms[0].surrogate.low == 0.1
    with pytest.raises(UnknownName, match="did you mean 'surrogate'"):
        recipe.replace(surogate=Clip())


def test_a_second_method_of_the_same_name_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from stepwell import Recipe, method\nfrom stepwell.objective.policy import Policy\n"
        "@method('grpo', title='mine')\ndef grpo():\n    return Recipe(Policy())\n"
    )
    with pytest.raises(InputError, match="There is a method 'grpo' already"):
        methods.load_plugin(file)
