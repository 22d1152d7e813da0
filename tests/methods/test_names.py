"""Names that people type: ids and aliases of methods, and the settings and options of other libraries."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import stepwell as sw
from stepwell import methods
from stepwell.api import settings_from
from stepwell.comparison.specs import parse_specs
from stepwell.errors import InputError, UnknownName, folded
from stepwell.foreign import names as foreign_names
from stepwell.methods.catalogue import search
from stepwell.objective.policy import Policy
from stepwell.recipe.recipe import Recipe
from stepwell.recipe.registry import method
from stepwell.training.settings import Settings

CARDS = [methods.get(name) for name in methods.names()]


def register(id: str, **card):
    """Register a method and take it out again."""

    def build() -> Recipe:
        return Recipe(Policy())

    try:
        method(id, title="Planted", **card)(build)
        return methods.get(id)
    finally:
        methods.forget(id)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_a_method_answers_to_its_id_and_aliases_however_they_are_typed(card):
    for name in (card.id, *card.aliases):
        for typed in (name, name.upper(), name.replace("-", "_"), name.replace("-", " "), name.replace("-", "")):
            assert methods.get(typed) is card


def test_no_two_methods_share_a_name():
    names = [folded(name) for card in CARDS for name in (card.id, *card.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("typed", "id"),
    [
        ("drgrpo", "dr-grpo"),
        ("dr_grpo", "dr-grpo"),
        ("Dr.GRPO", "dr-grpo"),
        ("rf++", "reinforce++"),
        ("reinforce_plus_plus", "reinforce++"),
        ("reinforce_plus_plus_baseline", "reinforce++-baseline"),
        ("opd", "on-policy-distillation"),
        ("on-policy-distill", "on-policy-distillation"),
        ("tb", "trajectory-balance"),
        ("subtb", "sub-trajectory-balance"),
        ("GPG", "gpg"),
        ("max@k", "poppy"),
        ("ddpo", "ddpo-is"),
        ("optimal_token_baseline", "otb"),
        ("geo_mean", "gmpo"),
    ],
)
def test_names_that_people_type_are_known(typed, id):
    assert methods.get(typed).id == id


@pytest.mark.parametrize(
    ("typed", "id"),
    [
        ("gsop", "gspo"),
        ("reinforce_pluplus", "reinforce++"),
        ("leave one out", "rloo"),
        ("direct preference", "dpo"),
        ("kahneman", "kto"),
        ("icepop", "tis"),
        ("mis", "tis"),
        ("rft", "raft"),
        ("STaR", "raft"),
        ("rest-em", "raft"),
        ("db", "sub-trajectory-balance"),
    ],
)
def test_an_unknown_name_points_to_the_method_it_means(typed, id):
    """By id, alias, title, or the words of the one card that mentions it: variants that an option of ours makes."""
    with pytest.raises(UnknownName, match=f"There is no method '{typed}'; did you mean '{id.replace('+', '[+]')}'"):
        methods.get(typed)


def test_a_name_that_is_near_to_none_lists_a_few():
    with pytest.raises(UnknownName, match=r"There is no method 'xyzzyx'; known: alignprop, .* and \d+ more\."):
        methods.get("xyzzyx")


@pytest.mark.parametrize(
    ("id", "card", "words"),
    [
        ("mine", {"aliases": ("gspo",)}, "There is a method 'gspo' already, from stepwell"),
        ("mine", {"aliases": ("OPD",)}, "There is a method 'OPD' already, an alias of 'on-policy-distillation' from"),
        ("GSPO", {}, "There is a method 'GSPO' already, from stepwell"),
        ("r_f++", {}, "There is a method 'r_f[+][+]' already, an alias of 'reinforce[+][+]' from stepwell"),
    ],
)
def test_a_name_of_another_method_is_refused(id, card, words):
    before = methods.names()
    with pytest.raises(InputError, match=words):
        register(id, **card)
    assert methods.names() == before


def test_a_method_may_be_registered_again_with_its_own_aliases():
    def build() -> Recipe:
        return Recipe(Policy())

    try:
        for aliases in (("planted-too",), ("planted-too", "third")):
            method("planted", title="Planted", aliases=aliases)(build)
        assert methods.get("Third").id == "planted"
    finally:
        methods.forget("planted")
    with pytest.raises(UnknownName):
        methods.get("planted-too")


def test_a_run_by_alias_is_a_run_of_the_method(tmp_path):
    def shorter(completions, **columns):
        return [-float(len(text)) for text in completions]

    found = []
    for name in ("dr-grpo", "DrGRPO"):
        out = tmp_path / name / "run"
        model = sw.exact.markov(symbols=3, length=3, seed=1)
        sw.train(model, [{"prompt": 0}], shorter, name, steps=2, learning_rate=0.1, out=out)
        found.append((out / "run.json").read_text())
    assert found[0] == found[1]
    assert '"method": "dr-grpo"' in found[1]


def test_a_comparison_by_alias_is_labelled_by_the_id():
    specs = parse_specs("DrGRPO,opd:to_go=true")
    assert [spec.label for spec in specs] == ["dr-grpo", "on-policy-distillation:to_go=True"]
    with pytest.raises(InputError, match="The method 'dr-grpo' is given twice"):
        parse_specs("dr-grpo,drgrpo")


# settings and options of other libraries


def test_every_foreign_name_leads_to_one_of_ours():
    settings = {entry.name for entry in dataclasses.fields(Settings)}
    options = {option for card in CARDS for option in card.options}
    assert {ours for each in foreign_names.SETTINGS.values() for ours in each} <= settings
    assert {ours for each in foreign_names.OPTIONS.values() for ours in each} <= options
    assert not set(foreign_names.SETTINGS) & settings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_generations", "There is no setting 'num_generations'; did you mean 'group_size'?"),
        ("per_device_train_batch_size", "did you mean 'prompts_per_step' or 'tokens_per_microbatch'?"),
        ("max_completion_length", "did you mean 'max_new_tokens' of the model?"),
        ("kl_coef", "did you mean the option 'kl' of the method, options={'kl': ...}?"),
        ("rollout.n", "did you mean 'group_size'?"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "did you mean 'minibatches'?"),
        ("lr", "did you mean 'learning_rate'?"),
        ("learning_rat", "did you mean 'learning_rate'?"),
    ],
)
def test_a_setting_of_another_library_points_to_ours(name, words):
    with pytest.raises(UnknownName) as error:
        settings_from(**{name: 1})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("id", "option", "words"),
    [
        ("grpo", "epsilon_high", "did you mean 'epsilon'?"),
        ("grpo", "beta", "There is no option of grpo 'beta'; did you mean 'kl'?"),
        ("grpo", "clip_range", "did you mean 'clip'?"),
        ("gspo", "clip_ratio_low", "did you mean 'low'?"),
        ("ppo", "vf_coef", "did you mean 'value_coefficient'?"),
        ("ppo", "gae_lambda", "did you mean 'lam'?"),
        ("grpo", "num_generations", "did you mean the setting 'group_size' of the run?"),
        ("gspo", "kl_loss_coef", "There is no option of gspo 'kl_loss_coef'; known: high, low, semantics."),
    ],
)
def test_an_option_of_another_library_points_to_ours(id, option, words):
    with pytest.raises(UnknownName) as error:
        methods.get(id).recipe(**{option: 0.1})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepspeed", "There is no setting 'deepspeed'; several ranks are started by `accelerate launch"),
        ("output_dir", "did you mean the argument 'out'?"),
        ("trainer.default_local_dir", "did you mean the argument 'out'?"),
        ("data.train_files", "did you mean the argument 'prompts'?"),
        ("reward_weights", "did you mean Rewards(functions, weights)?"),
        ("target_modules", "did you mean lora={'target_modules': ...} of the model?"),
        ("max_tool_calling_iterations", "did you mean 'max_turns' of the conversation?"),
        ("gpu_memory_utilization", "rollouts are drawn by the model itself"),
        ("adam_beta1", "AdamW learns"),
    ],
)
def test_a_name_that_belongs_elsewhere_or_nowhere_says_so(name, words):
    with pytest.raises(UnknownName) as error:
        settings_from(**{name: 1})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "num_generations",
            "There is no method 'num_generations'; did you mean the setting 'group_size'",
        ),
        ("cliprange", "did you mean the option 'clip' of a method?"),
        ("fsdp", "a model is not split over them."),
        ("gsop", "did you mean 'gspo'?"),
    ],
)
def test_a_setting_where_a_method_belongs_is_told_apart(name, words):
    with pytest.raises(UnknownName) as error:
        methods.get(name)
    assert words in str(error.value)


def test_every_name_of_ours_in_the_tables_is_one_of_ours():
    from stepwell.cli.arguments import argument_names
    from stepwell.cli.train import Train
    from stepwell.process.language.build import language
    from stepwell.process.pipeline.build import pipeline

    shell = set(argument_names(Train))
    assert set(foreign_names.MODEL.values()) <= set(inspect.signature(language).parameters)
    assert set(foreign_names.CONVERSATION.values()) <= shell
    assert set(foreign_names.PIPELINE.values()) <= set(inspect.signature(pipeline).parameters)
    for _, flag in (*foreign_names.ADAPTER.values(), *foreign_names.CALLS.values()):
        assert flag in shell | {""}


def test_no_name_has_both_a_counterpart_and_a_reason_for_none():
    mapped = {*foreign_names.SETTINGS, *foreign_names.MODEL, *foreign_names.OPTIONS, *foreign_names.CALLS}
    mapped |= {*foreign_names.ADAPTER, *foreign_names.CONVERSATION}
    assert not mapped & set(foreign_names.REASONS)


@pytest.mark.parametrize(
    ("typed", "id"), [("dr_grpo", "dr-grpo"), ("group-sequence", "gspo"), ("Entropy TOKENS", "high-entropy")]
)
def test_a_search_folds_case_hyphens_and_underscores(typed, id):
    assert id in [card.id for card in search(typed)]
