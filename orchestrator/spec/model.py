"""What a model is: backbone shape, and the factors of its Mixture-of-Experts block (MoE-Bench, LibMoE, MoE-RBench)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MoESpec:
    """The MoE block of one model.

    `top_k` and `num_experts` are the ROUTED numbers, never lowered again by shared experts. A field that is
    None is filled from the preset by `resolve_moe`; only resolved specs are hashed or built.
    """

    preset: str = "smoe"
    variant: str = ""
    top_k: int = 2
    num_experts: int = 8
    expert_width: int = 128
    shared_experts: int | None = None
    choice: str | None = None  # token | expert
    unit: str | None = None  # token | word | sentence
    pool: str | None = None  # first | causal_mean | full_mean
    score: str | None = None  # softmax | sigmoid | cosine
    renormalise: bool | None = None
    expert: str | None = None  # swiglu | relu_mlp | gelu_mlp_bias
    combine: str | None = None  # sum | weighted
    routed_scaling: float | None = None
    n_group: int | None = None
    topk_group: int | None = None
    group_score: str | None = None  # max | top2_sum
    train_select: str | None = None  # topc | threshold (expert choice)
    eval_select: str | None = None
    choice_group: str | None = None  # sequence | batch (expert choice)
    balance_bias: bool | None = None  # aux-loss-free bias buffer
    collaboration_top: int | None = None  # C2R: length of each expert's Top-T list, 0 = off
    zero_experts: int | None = None
    copy_experts: int | None = None
    constant_experts: int | None = None
    null_experts: int | None = None
    gating_residual: bool | None = None
    temperature: float | None = None
    router_init_std: float = 0.02


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model: the shape of its backbone and its MoE block.

    `vocab_size` 0 means: as many as the tokenizer has. `checkpoint` names a public checkpoint to start
    from instead of a random initialisation.
    """

    backbone: str = "olmoe"  # olmoe | deepseek_moe | smollm2
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    context: int = 512
    vocab_size: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    dense_layers: int = 0  # leading layers with a dense FFN (DeepSeekMoE: 1)
    dense_width: int = 0
    checkpoint: str = ""
    upcycle: str = ""  # "" | copy | partial | shared_only
    moe: MoESpec = field(default_factory=MoESpec)
