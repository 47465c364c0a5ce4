"""What a model is: backbone shape, and the factors of its Mixture-of-Experts block (MoE-Bench, LibMoE, MoE-RBench).

The published algorithms are values of these factors (`orchestrator.catalog.routers`), which also fill in what is not
written (`orchestrator.spec.resolve`); `moe_problems` is the validity matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from orchestrator.catalog.backbones import BACKBONES, DEFAULT_BACKBONE
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.gates import GATES, LINEAR
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import SPARSE
from orchestrator.catalog.scores import SCORES
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.registry import Registry
from orchestrator.spec.identity import NEUTRAL, parameters_of


@dataclass(frozen=True, slots=True)
class MoESpec:
    """The MoE block of one model.

    `top_k` and `num_experts` are the ROUTED numbers, never lowered again by shared experts. A field that is
    None is filled from the preset by `resolve_moe`; only resolved specs are hashed or built.
    """

    preset: str = SPARSE
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
    selection: str = field(default="top_k", metadata=NEUTRAL)
    """How a token's experts are selected from their scores."""
    gate: str = field(default=LINEAR, metadata=NEUTRAL)
    """From a token's hidden state to its logits."""
    gate_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("gate"))
    """The gate's own parameters, by name."""
    score_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("score"))
    """The score's own parameters, by name."""
    selection_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("selection"))
    """The selection's own parameters, by name."""
    expert_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("expert"))
    """The expert form's own parameters, by name."""
    parameters: Parameters = field(default=Parameters(), metadata=parameters_of("preset"))
    """The preset's own parameters, by name."""


@dataclass(frozen=True, slots=True)
class Moe(MoESpec):
    """The MoE block of one model with nothing left open: what `resolve_moe` returns; same fields, so the same keys."""

    WRITTEN: ClassVar[type] = MoESpec

    shared_experts: int = 0
    choice: str = "token"
    unit: str = "token"
    pool: str = "first"
    score: str = "softmax"
    renormalise: bool = True
    expert: str = "swiglu"
    combine: str = "sum"
    routed_scaling: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    train_select: str = "topc"
    eval_select: str = "topc"
    choice_group: str = "sequence"
    threshold_decay: float = 0.99
    balance_bias: bool = False
    collaboration_top: int = 0
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    null_experts: int = 0
    gating_residual: bool = False
    gating_layers: int = 1
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A causal language model: the shape of its backbone and its MoE block.

    `vocab_size` 0 means: as many as the tokenizer has. `checkpoint` names a public checkpoint to start from instead of
    a random initialisation; `checkpoint_digest` is the sha256 of its files, where it is a folder or a file.
    `foreign_tokenizer` lets a checkpoint be trained with a tokenizer that is not its own.
    """

    backbone: str = DEFAULT_BACKBONE
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
    head_dim: int = field(default=0, metadata=NEUTRAL)
    """Width of an attention head, 0 = hidden_size / num_heads."""
    qk_norm: str = field(default="", metadata=NEUTRAL)
    """RMS norm of queries and keys: `full` before they are split into heads, `head` in each; "" = the backbone's."""
    attention_bias: str = field(default="", metadata=NEUTRAL)
    """Projections with biases: "", `qkv`, or `all`."""

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def normed(self) -> str:
        """How queries and keys are normed: "", `full` or `head`."""
        return self.qk_norm or ("full" if BACKBONES[self.backbone].query_key_norm else "")


@dataclass(frozen=True, slots=True)
class Model(ModelSpec):
    """A model with nothing left open: what `resolve_model` returns. A grid writes a `ModelSpec` in its place."""

    WRITTEN: ClassVar[type] = ModelSpec
    moe: Moe = field(default_factory=Moe)


UPCYCLES = ("", "copy", "partial", "shared_only")
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "choice": ("token", "expert"),
        "unit": ("token", "word", "sentence"),
        "pool": ("first", "causal_mean", "full_mean"),
        "score": tuple(SCORES.builtins),
        "expert": tuple(EXPERTS.builtins),
        "combine": ("sum", "weighted"),
        "group_score": ("max", "top2_sum"),
        "train_select": ("topc", "threshold"),
        "eval_select": ("topc", "threshold"),
        "choice_group": ("sequence", "batch"),
        "gating_layers": (1, 2),
    }
)
# Fields of a block whose values are names in a registry, ours or another package's.
NAMED: Mapping[str, Registry[Any]] = MappingProxyType(
    {"score": SCORES, "expert": EXPERTS, "selection": SELECTIONS, "gate": GATES}
)
# Those that are neutral: what has one of its own says so by its default.
PARTS = ("selection", "gate")
# What a preset leaves open.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {one.name: one.default for one in dataclasses.fields(Moe) if getattr(MoESpec(), one.name) is None}
)
