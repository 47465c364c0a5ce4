"""What a model is: backbone shape, and the factors of its Mixture-of-Experts block (MoE-Bench, LibMoE, MoE-RBench).

`PRESETS` holds the published algorithms as values of these factors; `moe_problems` is the validity matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from orchestrator.spec.identity import NEUTRAL


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
    threshold_decay: float | None = None  # EMA of the expert-choice thresholds
    balance_bias: bool | None = None  # aux-loss-free bias buffer
    collaboration_top: int | None = None  # C2R: length of each expert's Top-T list, 0 = off
    zero_experts: int | None = None
    copy_experts: int | None = None
    constant_experts: int | None = None
    null_experts: int | None = None
    gating_residual: bool | None = None
    gating_layers: int | None = None  # 2 = the router is Linear, tanh, Linear (MoE++'s option)
    temperature: float | None = None
    router_init_std: float = 0.02


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model: the shape of its backbone and its MoE block.

    `vocab_size` 0 means: as many as the tokenizer has. `checkpoint` names a public checkpoint to start from instead of
    a random initialisation; `checkpoint_digest` is the sha256 of its files, where it is a folder or a file.
    `foreign_tokenizer` lets a checkpoint be trained with a tokenizer that is not its own.
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
    checkpoint_digest: str = field(default="", metadata=NEUTRAL)
    foreign_tokenizer: bool = field(default=False, metadata=NEUTRAL)


BACKBONES = ("olmoe", "deepseek_moe", "smollm2")
UPCYCLES = ("", "copy", "partial", "shared_only")
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "choice": ("token", "expert"),
        "unit": ("token", "word", "sentence"),
        "pool": ("first", "causal_mean", "full_mean"),
        "score": ("softmax", "sigmoid", "cosine"),
        "expert": ("swiglu", "relu_mlp", "gelu_mlp_bias"),
        "combine": ("sum", "weighted"),
        "group_score": ("max", "top2_sum"),
        "train_select": ("topc", "threshold"),
        "eval_select": ("topc", "threshold"),
        "choice_group": ("sequence", "batch"),
        "gating_layers": (1, 2),
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "shared_experts": 0,
        "choice": "token",
        "unit": "token",
        "pool": "first",
        "score": "softmax",
        "renormalise": True,
        "expert": "swiglu",
        "combine": "sum",
        "routed_scaling": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "group_score": "max",
        "train_select": "topc",
        "eval_select": "topc",
        "choice_group": "sequence",
        "threshold_decay": 0.99,
        "balance_bias": False,
        "collaboration_top": 0,
        "zero_experts": 0,
        "copy_experts": 0,
        "constant_experts": 0,
        "null_experts": 0,
        "gating_residual": False,
        "gating_layers": 1,
        "temperature": 1.0,
    }
)


def _preset(variants: Mapping[str, Mapping[str, Any]] | None = None, **fields: Any) -> dict[str, dict[str, Any]]:
    """Return variant name -> field values; the first variant is the default."""
    return {name: {**fields, **extra} for name, extra in (variants or {"": {}}).items()}


PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "dense": _preset(),
        "smoe": _preset(),
        "olmoe": _preset(renormalise=False),
        "deepseek_moe": _preset(
            {
                "16b": {},
                "v2": {"routed_scaling": 1.0},
                "v3": {"score": "sigmoid", "renormalise": True, "group_score": "top2_sum", "balance_bias": True},
            },
            renormalise=False,
            shared_experts=2,
        ),
        "sigma_moe": _preset({"original": {"renormalise": False}, "libmoe": {"renormalise": True}}, score="sigmoid"),
        "xmoe": _preset(
            {
                "paper": {"temperature": 0.07, "renormalise": False},
                "torchscale": {"temperature": 1.0, "renormalise": False},
                "libmoe_lm": {"temperature": 0.3, "renormalise": True},
                "libmoe_vlm": {"temperature": 0.3, "renormalise": False},
            },
            score="cosine",
        ),
        "sharede_v2": _preset(shared_experts=2),
        "sharede_v3": _preset(shared_experts=2, score="sigmoid"),
        "moepp": _preset(
            {"paper": {"renormalise": False}, "reference": {"renormalise": True}, "mixtral": {"renormalise": True}},
            zero_experts=1,
            copy_experts=1,
            constant_experts=2,
            gating_residual=True,
        ),
        "tc_moe": _preset(null_experts=1, renormalise=False),
        "expert_choice": _preset(choice="expert", renormalise=False),
        "word": _preset(unit="word"),
        "sentence": _preset(unit="sentence"),
        "aux_free": _preset(score="sigmoid", balance_bias=True),
        "c2r": _preset(),
    }
)


def resolve_moe(moe: MoESpec) -> MoESpec:
    """Return `moe` with every None field filled from its preset and variant; ValueError when they are unknown."""
    variants = PRESETS.get(moe.preset)
    if variants is None:
        raise ValueError(f"preset {moe.preset!r} is none of {', '.join(PRESETS)}")
    variant = moe.variant or next(iter(variants))
    if variant not in variants:
        known = ", ".join(v for v in variants if v) or "none: leave variant empty"
        raise ValueError(f"preset {moe.preset!r} has no variant {variant!r} ({known})")
    values = {**DEFAULTS, **variants[variant]}
    if moe.choice == "expert":
        values["renormalise"] = False
    if moe.preset == "c2r" and moe.collaboration_top is None:
        # Half of the other experts: between the legal ends k-1 (hardest limit) and N-1 (none).
        values["collaboration_top"] = max(moe.top_k - 1, (moe.num_experts - 1) // 2)
    missing = {name: value for name, value in values.items() if getattr(moe, name) is None}
    return dataclasses.replace(moe, variant=variant, **missing)


def resolve_model(model: ModelSpec) -> ModelSpec:
    """Return `model` with its MoE block resolved."""
    return dataclasses.replace(model, moe=resolve_moe(model.moe))


def is_causal(moe: MoESpec | Mapping[str, Any]) -> bool:
    """Return whether no later token can change an earlier token's routing, in training and in evaluation.

    `moe` may be the fields as a root document holds them; those of another version that are not known are left out.
    """
    if not isinstance(moe, MoESpec):
        names = {field.name for field in dataclasses.fields(MoESpec)}
        moe = MoESpec(**{name: value for name, value in moe.items() if name in names})
    moe = resolve_moe(moe) if moe.preset in PRESETS else moe
    if moe.choice == "expert":
        return moe.train_select == moe.eval_select == "threshold"
    return moe.unit == "token" or moe.pool != "full_mean"
