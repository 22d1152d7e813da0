"""Names that TRL, verl, vLLM and transformers have for settings of a run, of a model and of a method, and ours.

TRL's are fields of `GRPOConfig`, `RLOOConfig`, `DPOConfig`, `SFTConfig`, `RewardConfig` and `KTOConfig` and of
transformers' `TrainingArguments`, read in TRL 1.16, and of the configurations of PPO, GKD and CPO. verl's are entries
of its configuration of PPO (`verl/trainer/config/_generated_ppo_trainer.yaml`); its `rollout.n` and the like are known
with or without the names before the dot. vLLM's are of `SamplingParams` and of its engine, transformers' of
`GenerationConfig`. `clip_range`, `vf_coef` and `ent_coef` are those of stable-baselines3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stepwell.foreign.places import ADAPTER, CALLS, CONVERSATION, REASONS

SETTINGS: Mapping[str, tuple[str, ...]] = {
    # trl
    "num_generations": ("group_size",),
    "per_device_train_batch_size": ("prompts_per_step", "tokens_per_microbatch"),
    "per_device_eval_batch_size": ("rows_at_once",),
    "generation_batch_size": ("prompts_per_step",),
    "gradient_accumulation_steps": ("tokens_per_microbatch",),
    "gradient_checkpointing": ("tokens_per_microbatch",),
    "gradient_checkpointing_kwargs": ("tokens_per_microbatch",),
    "activation_checkpointing": ("tokens_per_microbatch",),
    "activation_checkpointing_kwargs": ("tokens_per_microbatch",),
    "activation_offloading": ("tokens_per_microbatch",),
    "auto_find_batch_size": ("tokens_per_microbatch",),
    "steps_per_generation": ("minibatches",),
    "num_iterations": ("epochs",),
    "max_steps": ("steps",),
    "num_train_epochs": ("steps",),
    "lr_scheduler_type": ("schedule",),
    "warmup_steps": ("warmup",),
    "max_grad_norm": ("max_gradient_norm",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "bf16_full_eval": ("precision",),
    "fp16_full_eval": ("precision",),
    "shuffle_dataset": ("shuffle",),
    "train_sampling_strategy": ("shuffle",),
    "data_seed": ("seed",),
    "eval_steps": ("evaluate_every",),
    "eval_strategy": ("evaluate_every",),
    "do_eval": ("evaluate_every",),
    "num_generations_eval": ("evaluation_samples",),
    "save_steps": ("checkpoint_every",),
    "save_strategy": ("checkpoint_every",),
    "save_total_limit": ("keep",),
    "report_to": ("trackers",),
    "disable_tqdm": ("progress",),
    "log_completions": ("completions_logged",),
    "num_completions_to_print": ("completions_logged",),
    # earlier transformers and trl
    "warmup_ratio": ("warmup",),
    "evaluation_strategy": ("evaluate_every",),
    "total_episodes": ("steps",),
    "local_rollout_forward_batch_size": ("rows_at_once",),
    # verl
    "rollout.n": ("group_size",),
    "val_kwargs.n": ("evaluation_samples",),
    "train_batch_size": ("prompts_per_step",),
    "gen_batch_size": ("prompts_per_step",),
    "val_batch_size": ("rows_at_once",),
    "ppo_mini_batch_size": ("minibatches",),
    "ppo_micro_batch_size": ("tokens_per_microbatch",),
    "ppo_micro_batch_size_per_gpu": ("tokens_per_microbatch",),
    "ppo_max_token_len_per_gpu": ("tokens_per_microbatch",),
    "use_dynamic_bsz": ("tokens_per_microbatch",),
    "enable_gradient_checkpointing": ("tokens_per_microbatch",),
    "enable_activation_offload": ("tokens_per_microbatch",),
    "ppo_epochs": ("epochs",),
    "total_training_steps": ("steps",),
    "total_epochs": ("steps",),
    "lr": ("learning_rate",),
    "warmup_style": ("schedule",),
    "lr_warmup_steps": ("warmup",),
    "lr_warmup_steps_ratio": ("warmup",),
    "grad_clip": ("max_gradient_norm",),
    "clip_grad": ("max_gradient_norm",),
    "test_freq": ("evaluate_every",),
    "val_before_train": ("evaluate_every",),
    "save_freq": ("checkpoint_every",),
    "max_actor_ckpt_to_keep": ("keep",),
    "log_val_generations": ("completions_logged",),
    "logger": ("trackers",),
    # vllm
    "max_num_seqs": ("rows_at_once",),
    "max_num_batched_tokens": ("rows_at_once",),
}
"""Settings of a run (`training.settings.Settings`)."""

MODEL: Mapping[str, str] = {
    "max_completion_length": "max_new_tokens",  # trl
    "max_length": "max_new_tokens",
    "chat_template_path": "chat_template",
    "eos_token": "eos",
    "use_cpu": "device",
    "torch_compile": "compile",
    "torch_compile_backend": "compile",
    "torch_compile_mode": "compile",
    "use_liger_kernel": "compile",
    "liger_kernel_config": "compile",
    "response_length": "max_new_tokens",  # verl
    "max_response_length": "max_new_tokens",
    "apply_chat_template_kwargs": "chat_template_kwargs",
    "custom_chat_template": "chat_template",
    "use_torch_compile": "compile",
    "use_liger": "compile",
    "model_dtype": "dtype",
    "log_prob_micro_batch_size": "tokens_at_once",
    "log_prob_micro_batch_size_per_gpu": "tokens_at_once",
    "log_prob_max_token_len_per_gpu": "tokens_at_once",
    "max_tokens": "max_new_tokens",  # vllm and transformers
    "max_model_len": "max_new_tokens",
    "stop_token_ids": "eos",
    "stop_strings": "eos",
    "eos_token_id": "eos",
    "skip_special_tokens": "keep_special_tokens",
    "torch_dtype": "dtype",
    "device_map": "device",
    "no_cuda": "device",
    "enable_thinking": "chat_template_kwargs",
    "system_prompt": "system",
    "processing_class": "tokenizer",
    "tokenizer_name_or_path": "tokenizer",
}
"""Settings of a language model (`sw.language`)."""

PIPELINE: Mapping[str, str] = {  # diffusers
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "timesteps": "times",
    "torch_dtype": "dtype",
}
"""Arguments of `sw.pipeline` and `sw.flow`."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    # trl
    "beta": ("kl",),
    "epsilon": ("clip", "low"),
    "epsilon_high": ("high",),
    "label_smoothing": ("smoothing",),
    "entropy_coef": ("entropy",),
    "num_iterations": ("epochs",),
    "loss_type": ("loss",),
    "f_divergence_type": ("divergence",),
    "ld_alpha": ("tail",),
    "use_weighting": ("weighted",),
    "sapo_temperature_neg": ("negative",),
    "sapo_temperature_pos": ("positive",),
    "vespo_k_neg": ("negative_shape",),
    "vespo_k_pos": ("positive_shape",),
    "vespo_lambda_neg": ("negative_rate",),
    "vespo_lambda_pos": ("positive_rate",),
    "vllm_importance_sampling_cap": ("cap",),
    "vllm_importance_sampling_clip_max": ("cap",),
    "vllm_importance_sampling_clip_min": ("floor",),
    "vllm_importance_sampling_mode": ("sequence", "mask"),
    "top_entropy_quantile": ("top",),
    # earlier trl's ppo, and others
    "kl_coef": ("kl",),
    "cliprange": ("clip", "low"),
    "cliprange_value": ("value_clip",),
    "vf_coef": ("value_coefficient",),
    "num_ppo_epochs": ("epochs",),
    "num_mini_batches": ("minibatches",),
    "cpo_alpha": ("likelihood",),
    "simpo_gamma": ("gamma",),
    # trl's kto
    "desirable_weight": ("desirable",),
    "undesirable_weight": ("undesirable",),
    # verl
    "kl_loss_coef": ("kl",),
    "use_kl_loss": ("kl",),
    "clip_ratio": ("clip", "low"),
    "clip_ratio_low": ("low", "clip"),
    "clip_ratio_high": ("high",),
    "clip_ratio_c": ("c", "dual"),
    "clip_cov_ratio": ("fraction",),
    "kl_cov_ratio": ("fraction",),
    "entropy_coeff": ("entropy",),
    "ppo_epochs": ("epochs",),
    "filter_groups.enable": ("refill",),
    "max_num_gen_batches": ("refill",),
    "overlong_buffer.len": ("buffer",),
    "rollout_is_threshold": ("cap",),
    "tis_imp_ratio_cap": ("cap",),
    # stable-baselines3
    "clip_range": ("clip", "low"),
    "clip_range_vf": ("value_clip",),
    "ent_coef": ("entropy",),
    "gae_lambda": ("lam",),
}
"""Options of methods: the first of ours that a method has."""


def setting_hint(name: str) -> str | None:
    """A hint for a setting that has another name here, or belongs elsewhere; None where there is no such name.

    Example:
        >>> setting_hint("num_generations")
        "did you mean 'group_size'?"
        >>> setting_hint("actor.kl_loss_coef")
        "did you mean the option 'kl' of the method, options={'kl': ...}?"
        >>> setting_hint("push_to_hub")
        'nothing is sent to a hub.'
    """
    for short in _endings(name):
        if short in SETTINGS:
            return f"did you mean {' or '.join(repr(ours) for ours in SETTINGS[short])}?"
        hint = _elsewhere(short)
        if hint is None and short in OPTIONS:
            option = OPTIONS[short][0]
            hint = f"did you mean the option '{option}' of the method, options={{'{option}': ...}}?"
        if hint is not None:
            return hint
    return None


def argument_hint(flag: str, known: Iterable[str]) -> str | None:
    """A hint for an argument that has another name among those `known`; None where there is no such name.

    Example:
        >>> argument_hint("--num_generations", ["--group-size"]), argument_hint("--kl-coef", ["--set"])
        ("did you mean '--group-size'?", "did you mean '--set kl=...'?")
    """
    known = set(known)
    if flag == "--setting" and "--learning-rate" in known:
        return "a setting of the run is an argument of its own, such as --learning-rate 1e-5; --set is for options."
    for short in _endings(flag.lstrip("-").replace("-", "_")):
        ours = SETTINGS.get(short, ())
        if "--setting" in known and (ours or any(short in names for names in SETTINGS.values())):
            return f"did you mean '--setting {ours[0] if ours else short}=...'?"
        ours += tuple(table[short] for table in (MODEL, CONVERSATION) if short in table)
        ours += tuple(table[short][1] for table in (ADAPTER, CALLS) if short in table)
        written = (f"--{prefix}{name.replace('_', '-')}" for name in ours if name for prefix in ("", "no-"))
        flags = [flag for flag in written if flag in known]
        if not flags and "--set" in known and short in OPTIONS:
            flags = [f"--set {OPTIONS[short][0]}=..."]
        if not flags and "--set" in known and any(short in names for names in OPTIONS.values()):
            flags = [f"--set {short}=..."]
        if flags:
            return f"did you mean {' or '.join(map(repr, flags))}?"
        if short in ADAPTER:
            return f"it is set in Python, by {ADAPTER[short][0]} of the model."
        if short in REASONS:
            return f"{REASONS[short]}."
    return None


def option_hint(name: str, known: Iterable[str]) -> str | None:
    """A hint for an option that has another name among those `known`, or belongs elsewhere; None otherwise.

    Example:
        >>> option_hint("clip_range", ["low", "high"]), option_hint("rollout.n", ["clip"])
        ("did you mean 'low'?", "did you mean the setting 'group_size' of the run?")
    """
    known = set(known)
    for short in _endings(name):
        ours = [each for each in OPTIONS.get(short, ()) if each in known]
        if ours:
            return f"did you mean '{ours[0]}'?"
        if short in SETTINGS:
            return f"did you mean the setting '{SETTINGS[short][0]}' of the run?"
        hint = _elsewhere(short)
        if hint is not None:
            return hint
    return None


def keyword_hint(name: str, known: Iterable[str]) -> str | None:
    """A hint for a keyword of a function in Python that has another name among those `known`, or belongs elsewhere.

    Example:
        >>> keyword_hint("max_tokens", ["max_new_tokens"]), keyword_hint("lora_alpha", ["lora"])
        ("did you mean 'max_new_tokens'?", "did you mean lora={'lora_alpha': ...}?")
        >>> keyword_hint("num_generations", ["max_new_tokens"])
        "did you mean the setting 'group_size' of the run?"
    """
    known = set(known)
    for short in _endings(name):
        ours = [table[short] for table in (MODEL, PIPELINE, CONVERSATION) if short in table]
        near = [each for each in (*ours, *SETTINGS.get(short, ())) if each in known]
        if near:
            return f"did you mean '{near[0]}'?"
        if short in ADAPTER and "lora" in known:
            return f"did you mean {ADAPTER[short][0]}?"
    return option_hint(name, ())


def method_hint(name: str) -> str | None:
    """A hint for what was typed where a method's name belongs, and is the name of a setting or an option elsewhere.

    Example:
        >>> method_hint("num_generations")
        "did you mean the setting 'group_size' of the run?"
    """
    for short in _endings(name):
        hint = f"did you mean the option '{OPTIONS[short][0]}' of a method?" if short in OPTIONS else None
        hint = option_hint(short, ()) or hint
        if hint is not None:
            return hint
    return None


def _elsewhere(short: str) -> str | None:
    """A hint for the name of something that is neither a setting of the run nor an option of a method."""
    if short in MODEL:
        return f"did you mean '{MODEL[short]}' of the model?"
    if short in ADAPTER:
        return f"did you mean {ADAPTER[short][0]} of the model?"
    if short in CONVERSATION:
        return f"did you mean '{CONVERSATION[short].removeprefix('turn_')}' of the conversation?"
    if short in CALLS:
        return f"did you mean {CALLS[short][0]}?"
    return f"{REASONS[short]}." if short in REASONS else None


def _endings(name: str) -> Iterable[str]:
    """The name, and what is left of it as names before dots go: `actor_rollout_ref.rollout.n`, `rollout.n`, `n`."""
    words = name.split(".")
    return (".".join(words[begin:]) for begin in range(len(words)))
