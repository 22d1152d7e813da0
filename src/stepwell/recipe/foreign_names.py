"""Names that TRL and verl have for settings of a run, of a model and of a method, and ours.

TRL's are fields of `GRPOConfig`, `RLOOConfig`, `DPOConfig` and of transformers' `TrainingArguments`, read in TRL 1.16,
or of the `PPOConfig` that earlier versions had. verl's are entries of its configuration of PPO, read in
`verl/trainer/config/_generated_ppo_trainer.yaml`; its `rollout.n` and the like are known with or without the names
before the dot. `clip_range`, `vf_coef` and `ent_coef` are those of stable-baselines3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SETTINGS: Mapping[str, tuple[str, ...]] = {
    # trl
    "num_generations": ("group_size",),
    "per_device_train_batch_size": ("prompts_per_step", "tokens_per_microbatch"),
    "generation_batch_size": ("prompts_per_step",),
    "gradient_accumulation_steps": ("tokens_per_microbatch",),
    "steps_per_generation": ("minibatches",),
    "num_iterations": ("epochs",),
    "max_steps": ("steps",),
    "num_train_epochs": ("steps",),
    "lr_scheduler_type": ("schedule",),
    "warmup_steps": ("warmup",),
    "max_grad_norm": ("max_gradient_norm",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "shuffle_dataset": ("shuffle",),
    "eval_steps": ("evaluate_every",),
    "num_generations_eval": ("evaluation_samples",),
    "save_steps": ("checkpoint_every",),
    "save_total_limit": ("keep",),
    "report_to": ("trackers",),
    "log_completions": ("completions_logged",),
    "num_completions_to_print": ("completions_logged",),
    # verl
    "rollout.n": ("group_size",),
    "train_batch_size": ("prompts_per_step",),
    "ppo_mini_batch_size": ("minibatches",),
    "ppo_micro_batch_size": ("tokens_per_microbatch",),
    "ppo_micro_batch_size_per_gpu": ("tokens_per_microbatch",),
    "ppo_max_token_len_per_gpu": ("tokens_per_microbatch",),
    "ppo_epochs": ("epochs",),
    "total_training_steps": ("steps",),
    "total_epochs": ("steps",),
    "lr": ("learning_rate",),
    "warmup_style": ("schedule",),
    "lr_warmup_steps": ("warmup",),
    "grad_clip": ("max_gradient_norm",),
    "test_freq": ("evaluate_every",),
    "save_freq": ("checkpoint_every",),
    "max_actor_ckpt_to_keep": ("keep",),
    "log_val_generations": ("completions_logged",),
    "logger": ("trackers",),
}
"""Settings of a run (`training.settings.Settings`)."""

MODEL: Mapping[str, str] = {
    "max_completion_length": "max_new_tokens",  # trl
    "response_length": "max_new_tokens",  # verl
    "max_response_length": "max_new_tokens",
}
"""Settings of a language model (`sw.language`)."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    # trl
    "beta": ("kl",),
    "epsilon": ("clip", "low"),
    "epsilon_high": ("high",),
    "label_smoothing": ("smoothing",),
    "entropy_coef": ("entropy",),
    "num_iterations": ("epochs",),
    # earlier trl's ppo
    "kl_coef": ("kl",),
    "cliprange": ("clip", "low"),
    "cliprange_value": ("value_clip",),
    "vf_coef": ("value_coefficient",),
    "num_ppo_epochs": ("epochs",),
    "num_mini_batches": ("minibatches",),
    # verl
    "kl_loss_coef": ("kl",),
    "clip_ratio": ("clip", "low"),
    "clip_ratio_low": ("low", "clip"),
    "clip_ratio_high": ("high",),
    "clip_ratio_c": ("c", "dual"),
    "entropy_coeff": ("entropy",),
    "ppo_epochs": ("epochs",),
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
    """
    for short in _endings(name):
        if short in SETTINGS:
            return f"did you mean {' or '.join(repr(ours) for ours in SETTINGS[short])}?"
        if short in MODEL:
            return f"did you mean '{MODEL[short]}' of the model?"
        if short in OPTIONS:
            option = OPTIONS[short][0]
            return f"did you mean the option '{option}' of the method, options={{'{option}': ...}}?"
    return None


def argument_hint(flag: str, known: Iterable[str]) -> str | None:
    """A hint for an argument that has another name among those `known`; None where there is no such name.

    Example:
        >>> argument_hint("--num_generations", ["--group-size"]), argument_hint("--kl-coef", ["--set"])
        ("did you mean '--group-size'?", "did you mean '--set kl=...'?")
    """
    known = set(known)
    for short in _endings(flag.lstrip("-").replace("-", "_")):
        ours = SETTINGS.get(short) or ((MODEL[short],) if short in MODEL else ())
        flags = [flag for flag in (f"--{name.replace('_', '-')}" for name in ours) if flag in known]
        if short in OPTIONS and not flags and "--set" in known:
            flags = [f"--set {OPTIONS[short][0]}=..."]
        if flags:
            return f"did you mean {' or '.join(map(repr, flags))}?"
    return None


def option_hint(name: str, known: Iterable[str]) -> str | None:
    """A hint for an option that has another name among those `known`, or is a setting of the run; None otherwise.

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
        if short in MODEL:
            return f"did you mean '{MODEL[short]}' of the model?"
    return None


def _endings(name: str) -> Iterable[str]:
    """The name, and what is left of it as names before dots go: `actor_rollout_ref.rollout.n`, `rollout.n`, `n`."""
    words = name.split(".")
    return (".".join(words[begin:]) for begin in range(len(words)))
