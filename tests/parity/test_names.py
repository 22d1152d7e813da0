"""The names of settings that are said to be TRL's are TRL's."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re

import pytest

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is where these names were read")

from trl import DPOConfig, GRPOConfig, RLOOConfig

from stepwell.foreign import names as foreign_names


def under(heading: str) -> set[str]:
    """The names that stand under a comment of the table, up to the next."""
    lines = inspect.getsource(foreign_names).split(f"    # {heading}\n")[1:]
    return {
        name
        for text in lines
        for name in re.findall(r'^    "([\w.]+)":', re.split(r"^    #|^}", text, flags=re.M)[0], re.M)
    }


def test_the_names_said_to_be_trls_are_fields_of_its_configurations():
    fields = {entry.name for config in (GRPOConfig, RLOOConfig, DPOConfig) for entry in dataclasses.fields(config)}
    assert len(under("trl")) > 20
    assert under("trl") <= fields


CONFIGURATIONS = ("GRPOConfig", "RLOOConfig", "DPOConfig", "SFTConfig", "RewardConfig", "KTOConfig")


def test_every_field_of_trls_configurations_is_ours_too_or_points_somewhere():
    """A field has our name, another one, or a reason why it has none."""
    import trl

    from stepwell import methods
    from stepwell.process.language.build import language
    from stepwell.training.settings import Settings

    ours = {entry.name for entry in dataclasses.fields(Settings)} | set(inspect.signature(language).parameters)
    ours |= {option for name in methods.names() for option in methods.get(name).options}
    fields = {entry.name for name in CONFIGURATIONS for entry in dataclasses.fields(getattr(trl, name))}
    assert len(fields) > 200
    assert {name for name in fields - ours if foreign_names.setting_hint(name) is None} == set()


def test_every_field_of_pefts_and_every_way_of_transformers_to_draw_points_somewhere():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapter = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "modules_to_save", "bias"}
    assert adapter <= {entry.name for entry in dataclasses.fields(peft.LoraConfig)}
    drawing = {"repetition_penalty", "num_beams", "do_sample", "stop_strings", "eos_token_id", "no_repeat_ngram_size"}
    drawing |= {"min_new_tokens", "num_return_sequences", "typical_p", "bad_words_ids", "max_length", "use_cache"}
    assert drawing <= set(transformers.GenerationConfig().to_dict())
    assert all(foreign_names.setting_hint(name) is not None for name in adapter | drawing)


VERL = """
    actor_rollout_ref.actor.ppo_mini_batch_size actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
    actor_rollout_ref.actor.use_kl_loss actor_rollout_ref.actor.kl_loss_coef actor_rollout_ref.actor.kl_loss_type
    actor_rollout_ref.actor.clip_ratio actor_rollout_ref.actor.clip_ratio_low actor_rollout_ref.actor.clip_ratio_high
    actor_rollout_ref.actor.clip_ratio_c actor_rollout_ref.actor.entropy_coeff actor_rollout_ref.actor.ppo_epochs
    actor_rollout_ref.actor.loss_agg_mode actor_rollout_ref.actor.grad_clip actor_rollout_ref.actor.optim.lr
    actor_rollout_ref.actor.optim.lr_warmup_steps actor_rollout_ref.actor.use_dynamic_bsz
    actor_rollout_ref.actor.fsdp_config.param_offload actor_rollout_ref.actor.ulysses_sequence_parallel_size
    actor_rollout_ref.model.path actor_rollout_ref.model.enable_gradient_checkpointing
    actor_rollout_ref.model.use_remove_padding actor_rollout_ref.model.lora_rank actor_rollout_ref.model.target_modules
    actor_rollout_ref.rollout.n actor_rollout_ref.rollout.gpu_memory_utilization
    actor_rollout_ref.rollout.tensor_model_parallel_size actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.rollout.response_length actor_rollout_ref.rollout.val_kwargs.n
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns algorithm.adv_estimator algorithm.use_kl_in_reward
    algorithm.kl_ctrl.kl_coef algorithm.kl_penalty algorithm.norm_adv_by_std_in_grpo algorithm.filter_groups.enable
    critic.cliprange_value data.train_files data.val_files data.prompt_key data.train_batch_size
    data.max_prompt_length data.max_response_length data.filter_overlong_prompts data.truncation
    trainer.total_epochs trainer.total_training_steps trainer.test_freq trainer.save_freq trainer.logger
    trainer.project_name trainer.experiment_name trainer.n_gpus_per_node trainer.nnodes trainer.default_local_dir
    trainer.resume_mode trainer.val_before_train custom_reward_function.path reward_model.path
""".split()


@pytest.mark.parametrize("name", VERL)
def test_every_name_that_verls_recipes_set_points_somewhere(name):
    assert foreign_names.setting_hint(name) is not None
