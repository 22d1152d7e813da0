"""Names of other libraries that belong to an adapter, a conversation or a call, and those without a counterpart.

They are TRL's, verl's, vLLM's, transformers' and peft's (`LoraConfig`), read where those of `names` were.
"""

from __future__ import annotations

from collections.abc import Mapping

ADAPTER: Mapping[str, tuple[str, str]] = {
    "r": ("lora={'r': ...}", "lora_rank"),
    "lora_r": ("lora={'r': ...}", "lora_rank"),
    "lora_rank": ("lora={'r': ...}", "lora_rank"),
    "lora_alpha": ("lora={'lora_alpha': ...}", "lora_alpha"),
    "target_modules": ("lora={'target_modules': ...}", "lora_targets"),
    "lora_target_modules": ("lora={'target_modules': ...}", "lora_targets"),
    "use_peft": ("lora={'r': 8}", "lora"),
    "peft_config": ("lora={'r': 8}", "lora"),
} | {
    name: (f"lora={{'{name}': ...}}", "")
    for name in """
    lora_dropout use_rslora use_dora bias modules_to_save exclude_modules layers_to_transform layers_pattern
    rank_pattern alpha_pattern init_lora_weights target_parameters trainable_token_indices ensure_weight_tying
    fan_in_fan_out lora_bias layer_replication
""".split()
}
"""Settings of an adapter, which `sw.language` and `sw.pipeline` take as peft names them, and arguments of the shell."""

CONVERSATION: Mapping[str, str] = {
    "max_tool_calling_iterations": "max_turns",  # trl
    "environment_factory": "environment",
    "rollout_func": "environment",
    "max_assistant_turns": "max_turns",  # verl
    "max_user_turns": "max_turns",
    "interaction_config_path": "environment",
    "stop": "turn_stop",  # vllm
}
"""Settings of a conversation (`sw.conversation`), by the argument of the shell."""

CALLS: Mapping[str, tuple[str, str]] = {
    "output_dir": ("the argument 'out'", "out"),  # trl
    "resume_from_checkpoint": ("the argument 'resume'", "resume"),
    "reward_weights": ("Rewards(functions, weights)", "reward_weights"),
    "reward_funcs": ("the argument 'reward'", "reward"),
    "reward_model_path": ("the argument 'reward'", "reward"),
    "train_dataset": ("the argument 'prompts'", "data"),
    "dataset_name": ("the argument 'prompts'", "data"),
    "eval_dataset": ("the argument 'evaluation'", "evaluation"),
    "dataset_text_field": ("load_prompts(file, column)", "prompt_column"),
    "model_name_or_path": ("the model of language(...)", "model"),
    "teacher_model": ("the argument 'teacher'", "teacher"),
    "teacher_model_name_or_path": ("the argument 'teacher'", "teacher"),
    "callbacks": ("the argument 'on_step'", ""),
    "default_local_dir": ("the argument 'out'", "out"),  # verl
    "resume_mode": ("the argument 'resume'", "resume"),
    "resume_from_path": ("the argument 'resume'", "resume"),
    "train_files": ("the argument 'prompts'", "data"),
    "val_files": ("the argument 'evaluation'", "evaluation"),
    "prompt_key": ("load_prompts(file, column)", "prompt_column"),
    "model.path": ("the model of language(...)", "model"),
    "reward_model.path": ("the argument 'reward'", "reward"),
    "custom_reward_function": ("the argument 'reward'", "reward"),
    "custom_reward_function.path": ("the argument 'reward'", "reward"),
    "custom_reward_function.name": ("the argument 'reward'", "reward"),
    "adv_estimator": ("the argument 'method'", "method"),
    "loss_mode": ("the argument 'method'", "method"),
}
"""Arguments of `sw.train` and of what it is given, in words, and arguments of `stepwell train`."""

_WITHOUT: Mapping[str, str] = {
    "each of these is a method of its own, see `stepwell methods`; trl-grpo takes TRL's names": """
        importance_sampling_level scale_rewards normalize_advantages delta off_policy_mask_threshold
        use_bias_correction_kl mask_truncated_completions multi_objective_aggregation norm_adv_by_std_in_grpo
        loss_agg_mode use_kl_in_reward kl_penalty kl_loss_type loss_weights discopop_tau f_alpha_divergence_coef
        reward_clip_range use_adaptive_entropy entropy_target entropy_coef_min entropy_coef_max entropy_coef_delta
        lmbda seq_kd missing_eos_penalty vllm_importance_sampling_correction""",
    "the reference is part of the method: it stays as training began, or is synced": """
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs precompute_ref_batch_size""",
    "AdamW learns, with the moments that PyTorch gives it": """
        optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs betas
        neftune_noise_alpha label_smoothing_factor torch_empty_cache_steps disable_dropout router_aux_loss_coef
        cast_lm_head_to_fp32 center_rewards_coefficient""",
    "rollouts are drawn by the model itself, or by an engine that a process brings (docs/adding.md)": """
        use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout vllm_group_port
        vllm_gpu_memory_utilization vllm_max_model_length vllm_model_impl vllm_tensor_parallel_size
        vllm_enable_sleep_mode vllm_structured_outputs_regex use_transformers_paged
        use_transformers_continuous_batching transformers_continuous_batching_config cache_implementation use_cache
        ds3_gather_for_generation generation_kwargs gpu_memory_utilization tensor_parallel_size
        tensor_model_parallel_size enforce_eager free_cache_engine enable_chunked_prefill cache_config
        max_cache_len disable_compile prefill_chunk_size""",
    "samples are drawn from the model's own distribution, cut by temperature, top_k, top_p and min_p alone": """
        repetition_penalty presence_penalty frequency_penalty length_penalty no_repeat_ngram_size bad_words
        bad_words_ids suppress_tokens begin_suppress_tokens num_beams num_beam_groups diversity_penalty do_sample
        typical_p epsilon_cutoff eta_cutoff penalty_alpha top_h min_tokens min_new_tokens min_length logit_bias
        sequence_bias forced_bos_token_id forced_eos_token_id num_return_sequences best_of guidance_scale
        early_stopping""",
    "several ranks are started by `accelerate launch -m stepwell train`, and a model is not split over them": """
        deepspeed fsdp fsdp_config accelerator_config parallelism_config local_rank ddp_backend ddp_timeout
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph n_gpus_per_node nnodes
        average_tokens_across_devices strategy param_offload optimizer_offload fsdp_size
        ulysses_sequence_parallel_size""",
    "every row of the data is a prompt with its columns, read at once and in this process": """
        dataloader_drop_last dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
        dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context dataset_num_proc
        dataset_kwargs remove_unused_columns ignore_data_skip label_names length_column_name packing packing_strategy
        eval_packing padding_free pad_token pad_token_id pad_to_multiple_of truncation_mode max_prompt_length
        filter_overlong_prompts truncation return_raw_chat padding_value generate_during_eval""",
    "demonstrations are a column of the data; `stepwell methods --search column` lists who learns from them": """
        completion_only_loss assistant_only_loss""",
    "every step is in the log of the run's folder": """
        logging_steps logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica
        log_on_each_node log_completions_hub_repo log_multimodal log_unique_prompts include_num_input_tokens_seen
        include_for_metrics skip_memory_metrics debug run_name project project_name experiment_name trackio_space_id
        trackio_bucket_id trackio_static_space_id rollout_data_dir validation_data_dir""",
    "an evaluation is the mean reward on held-out prompts (evaluation and evaluate_every)": """
        batch_eval_metrics eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
        eval_use_gather_object do_predict do_train prediction_loss_only metric_for_best_model greater_is_better
        load_best_model_at_end""",
    "a checkpoint is always whole, and is resumed bit for bit": """
        save_only_model save_on_each_node restore_callback_states_from_checkpoint enable_jit_checkpoint
        full_determinism tf32 save_contents load_contents del_local_ckpt_after_load""",
    "nothing is sent to a hub": """
        push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision""",
    "a model is loaded from safetensors by its folder or id, and no code that comes with it is run": """
        trust_remote_code model_init_kwargs teacher_model_init_kwargs attn_implementation load_in_4bit load_in_8bit
        use_remove_padding use_shm external_lib override_config revision""",
    "the model's kind decides it": "is_encoder_decoder task_type inference_mode auto_mapping base_model_name_or_path",
}

REASONS: Mapping[str, str] = {name: reason for reason, names in _WITHOUT.items() for name in names.split()}
"""Names without a counterpart, each with the reason."""
