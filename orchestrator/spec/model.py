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
    """Published algorithm whose values the other fields have, where they are not given."""
    variant: str = ""
    """Variant of the preset; "" = its first."""
    top_k: int = 2
    """Routed experts of a token."""
    num_experts: int = 8
    """Routed experts of a layer."""
    expert_width: int = 128
    """Hidden units of an expert."""
    shared_experts: int | None = None
    """Experts that every token uses, beside the routed ones."""
    choice: str | None = None
    """Tokens choose experts, or experts tokens (Expert Choice)."""
    unit: str | None = None
    """What is routed together: a token, a word or a sentence."""
    pool: str | None = None
    """How a unit's logits are made of its tokens'."""
    score: str | None = None
    """Function from logits to scores."""
    renormalise: bool | None = None
    """Whether the weights of a token's experts sum to 1."""
    expert: str | None = None
    """Form of an expert's network."""
    combine: str | None = None
    """How experts' outputs are combined."""
    routed_scaling: float | None = None
    """Factor of the routed output (DeepSeek)."""
    n_group: int | None = None
    """Groups of experts."""
    topk_group: int | None = None
    """Groups of a token."""
    group_score: str | None = None
    """Score of a group: its largest expert, or the sum of its two largest."""
    train_select: str | None = None
    """Expert choice in training: `topc` takes the best tokens, `threshold` all above one."""
    eval_select: str | None = None
    """The same in evaluation."""
    choice_group: str | None = None
    """Tokens that an expert chooses from."""
    threshold_decay: float | None = None
    """Decay of the running thresholds of expert choice."""
    balance_bias: bool | None = None
    """A bias in the selection that evens the load (loss-free balancing)."""
    collaboration_top: int | None = None
    """C2R: length of each expert's list of partners, 0 = off."""
    zero_experts: int | None = None
    """MoE++: experts that give 0."""
    copy_experts: int | None = None
    """MoE++: experts that give their input."""
    constant_experts: int | None = None
    """MoE++: experts that mix the input with a learned vector."""
    null_experts: int | None = None
    """TC-MoE: experts that compute nothing."""
    gating_residual: bool | None = None
    """MoE++: logits of the previous layer are added."""
    gating_layers: int | None = None
    """Layers of the router's network."""
    temperature: float | None = None
    """Divides the logits."""
    router_init_std: float = 0.02
    """Standard deviation of the router's initial weights."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model: the shape of its backbone and its MoE block.

    `vocab_size` 0 means: as many as the tokenizer has. `checkpoint` names a public checkpoint to start from instead of
    a random initialisation; `checkpoint_digest` is the sha256 of its files, where it is a folder or a file.
    `foreign_tokenizer` lets a checkpoint be trained with a tokenizer that is not its own.
    """

    backbone: str = "olmoe"
    """Architecture around the MoE blocks."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 4
    """Heads of keys and values."""
    context: int = 512
    """Longest sequence."""
    vocab_size: int = 0
    """Tokens of the embedding, 0 = as many as the tokenizer has."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    tie_embeddings: bool = False
    """Whether the head is the embedding matrix."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dense_layers: int = 0
    """Leading layers with a dense FFN (DeepSeekMoE: 1)."""
    dense_width: int = 0
    """Hidden units of their FFN."""
    checkpoint: str = ""
    """Public checkpoint to start from instead of a random initialisation."""
    upcycle: str = ""
    """How a dense checkpoint's FFN becomes experts."""
    moe: MoESpec = field(default_factory=MoESpec)
    """The MoE block."""
    checkpoint_digest: str = field(default="", metadata=NEUTRAL)
    """Digest of the checkpoint's files."""
    foreign_tokenizer: bool = field(default=False, metadata=NEUTRAL)
    """Let a checkpoint be trained with a tokenizer that is not its own."""


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
