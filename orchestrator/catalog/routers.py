"""Routers: the published algorithms, and those of other packages, each one declaration.

A preset is a set of values for the factors of `MoESpec`; where that is not enough it has code of its own, counted in
ids, parameters and limits. Nothing else in the project knows a preset by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.gates import GATES
from orchestrator.registry import Registry

if TYPE_CHECKING:
    from orchestrator.spec.model import Moe, MoESpec

# The plain one, which is the default, its twin without a router, and those of public checkpoints.
SPARSE, DENSE, OLMOE, DEEPSEEK = "smoe", "dense", "olmoe", "deepseek_moe"
PLAIN = "jobs.moe.routers:Router"
Fields = Mapping[str, Any]  # of the block, by name
Faults = Iterable[tuple[str, str]]  # (field of the block, message)


def experts_alone(moe: Moe) -> int:
    """Return the ids of a router that chooses from the routed experts alone."""
    return moe.num_experts


def nothing(moe: Moe, hidden_size: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class RouterKind:
    """A router by name.

    `code` is its class, "package.module:Class"; `variants` the values it gives to fields of the block, by variant, the
    first of which is the default; `derived` gives values that depend on the sizes; `parameters` is the dataclass of its
    own parameters (`MoESpec.parameters`). `problems` says what it cannot be combined with, as (field, message).
    `ids` is from how many it chooses; `parameter_count(moe, hidden_size)` counts the trained numbers of one layer's
    router and of what it brings beside the experts, None where that is its gate alone (`MoESpec.gate`): a router
    that counts its own has a gate of its own;
    `first_layer_lacks` is how many of them the first MoE layer does not have.
    """

    name: str
    code: str = PLAIN
    variants: Mapping[str, Fields] = field(default_factory=lambda: {"": {}})
    derived: Callable[[MoESpec], Fields] | None = None
    parameters: type | None = None
    problems: Callable[[Moe], Faults] | None = None
    ids: Callable[[Moe], int] = experts_alone
    parameter_count: Callable[[Moe, int], int] | None = None
    first_layer_lacks: Callable[[Moe, int], int] = nothing
    scores: tuple[str, ...] = ()  # those it goes with; () = all that need no projection
    needs: tuple[str, ...] = ()  # fields of the block that must not be 0
    own: tuple[str, ...] = ()  # fields of the block that no other kind may set
    records: tuple[str, ...] = ()  # which of `cost` and `null` its routing records hold
    causal: bool = True  # False where a later token may change an earlier one's routing
    routes: bool = True  # False of the dense twin
    whole: bool = False  # True where it selects and weighs in one: parts of both are then its own
    biased: bool = False  # True where a balancing bias may stand beside ids without an expert: theirs stays
    standardised: bool = False  # True where code of its own brings logits to `logit_std`, as the plain ones do
    printed: tuple[str, ...] = ()  # what the published tables call it
    version: int = 1

    @property
    def plain(self) -> bool:
        """True when it only fills in fields: its name decides nothing that they do not."""
        return self.routes and self.code == PLAIN

    def count(self, moe: Moe, hidden_size: int, *, first: bool) -> int:
        """Return the trained numbers of one layer's router and of what it brings beside the experts."""
        scales = self.ids(moe) if moe.expert_scale else 0
        if self.parameter_count is None:
            return GATES.get(moe.gate).count(self.ids(moe), hidden_size, moe.gate_parameters) + scales
        lacking = self.first_layer_lacks(moe, hidden_size) if first else 0
        return self.parameter_count(moe, hidden_size) - lacking + scales


def _variants(variants: Mapping[str, Fields] | None = None, **fields: object) -> dict[str, Fields]:
    """Return variant name -> field values; the first variant is the default."""
    return {name: {**fields, **extra} for name, extra in (variants or {"": {}}).items()}


def _xmoe(moe: Moe) -> Iterator[tuple[str, str]]:
    if moe.num_experts < 2:
        yield "preset", "preset 'xmoe' projects to num_experts / 2 dimensions: it needs at least 2 experts"
    if moe.choice == "expert":
        yield "choice", "choice 'expert' with preset 'xmoe': scores are cosines of a token, not comparable over tokens"
    if moe.variant == "libmoe_vlm" and moe.top_k == 1:
        yield "preset", "preset 'xmoe' variant 'libmoe_vlm' with top_k 1: a softmax over one weight has no gradient"
    if moe.n_group > 1:
        yield "n_group", "n_group > 1 applies to plain token choice (softmax or sigmoid) only"


def _xmoe_count(moe: Moe, hidden_size: int) -> int:
    rank = moe.parameters.get("rank", 0) or max(1, moe.num_experts // 2)
    return rank * (hidden_size + moe.num_experts) + int(moe.variant == "paper")


@dataclass(frozen=True, slots=True)
class XMoEParameters:
    """Dimensions of the space of the cosines: 0 = N / 2 (TorchScale: 16)."""

    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, it is {self.rank}")


@dataclass(frozen=True, slots=True)
class SparsemixerParameters:
    """How far below the best an expert may lie: (best - h) / max(|h|, best) <= 2 jitter."""

    jitter: float = 0.01

    def __post_init__(self) -> None:
        if not self.jitter > 0:
            raise ValueError(f"jitter must be above 0, not {self.jitter:g}")


@dataclass(frozen=True, slots=True)
class ZayaParameters:
    """Width of the router's own state, and the epsilon of its norm."""

    router_size: int = 256
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.router_size < 1:
            raise ValueError(f"router_size must be at least 1, it is {self.router_size}")
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, it is {self.eps:g}")


def _zaya_ids(moe: Moe) -> int:
    return moe.num_experts + 1


def _zaya_size(moe: Moe) -> int:
    size: int = moe.parameters.get("router_size", ZayaParameters().router_size)
    return size


def _zaya_count(moe: Moe, hidden_size: int) -> int:
    size = _zaya_size(moe)
    # Into the state; the scale of the previous layer's; the norm; two layers with biases; to the ids.
    return size * (hidden_size + 1) + size + size + 2 * size * (size + 1) + _zaya_ids(moe) * size


def _zaya_scale(moe: Moe, hidden_size: int) -> int:
    return _zaya_size(moe)


def _inkling(moe: Moe) -> Iterator[tuple[str, str]]:
    if moe.combine != "sum":
        yield "combine", f"combine {moe.combine!r} with preset 'inkling': its router weighs shared experts too"
    if moe.shared_gate:
        yield "shared_gate", "shared_gate with preset 'inkling': its router weighs shared experts too"
    form = EXPERTS.find(moe.shared_expert or moe.expert)
    if form is not None and form.bias:
        yield "expert", f"expert {form.name!r} with preset 'inkling': biases of weighed shared experts are not weighed"
    if not moe.renormalise:
        yield "renormalise", "preset 'inkling' renormalises by definition, over routed and shared experts"


def _inkling_count(moe: Moe, hidden_size: int) -> int:
    return (moe.num_experts + moe.shared_experts) * hidden_size + 1


def _sparsemixer(moe: Moe) -> Iterator[tuple[str, str]]:
    if moe.renormalise:
        yield "renormalise", "renormalise with preset 'sparsemixer': each weight is a softmax of its own"
    if moe.balance_bias:
        yield "balance_bias", "balance_bias with preset 'sparsemixer': experts are drawn by their logits"


def _moepp_ids(moe: Moe) -> int:
    return moe.num_experts + moe.constant_experts + moe.copy_experts + moe.zero_experts


def _moepp(moe: Moe) -> Iterator[tuple[str, str]]:
    if _moepp_ids(moe) == moe.num_experts:
        yield "preset", "preset 'moepp' needs zero_experts, copy_experts or constant_experts"
    if moe.variant != "paper" and not moe.renormalise:
        yield "preset", f"preset 'moepp' variant {moe.variant!r} renormalises by definition"


def _moepp_count(moe: Moe, hidden_size: int) -> int:
    ids = _moepp_ids(moe)
    router = 8 * ids * (hidden_size + ids) if moe.gating_layers == 2 else ids * hidden_size
    return router + _moepp_residual(moe, hidden_size) + moe.constant_experts * 3 * hidden_size


def _moepp_residual(moe: Moe, hidden_size: int) -> int:
    return _moepp_ids(moe) ** 2 if moe.gating_residual else 0


def _tc_moe_ids(moe: Moe) -> int:
    return 2 * moe.num_experts + moe.null_experts


def _tc_moe(moe: Moe) -> Iterator[tuple[str, str]]:
    if moe.renormalise:
        yield "renormalise", "renormalise with preset 'tc_moe': its weights have a normalisation of their own"


def _half_of_the_others(moe: MoESpec) -> Fields:
    """Between the legal ends of C2R's lists: k-1 (hardest limit) and N-1 (none)."""
    return {"collaboration_top": max(moe.top_k - 1, (moe.num_experts - 1) // 2)}


BUILT_IN = (
    RouterKind(DENSE, routes=False, printed=("Dense",)),
    RouterKind(SPARSE, printed=("SMoE",)),
    RouterKind(OLMOE, variants=_variants(renormalise=False)),
    RouterKind(
        DEEPSEEK,
        variants=_variants(
            {
                "16b": {},
                "v2": {"routed_scaling": 1.0},
                "v3": {"score": "sigmoid", "renormalise": True, "group_score": "top2_sum", "balance_bias": True},
            },
            renormalise=False,
            shared_experts=2,
        ),
    ),
    RouterKind(
        "sigma_moe",
        variants=_variants({"original": {"renormalise": False}, "libmoe": {"renormalise": True}}, score="sigmoid"),
        scores=("sigmoid",),
        printed=("σ -MoE",),
    ),
    RouterKind(
        "xmoe",
        code="jobs.moe.routers:XMoE",
        variants=_variants(
            {
                "paper": {"temperature": 0.07, "renormalise": False},
                "torchscale": {"temperature": 1.0, "renormalise": False},
                "libmoe_lm": {"temperature": 0.3, "renormalise": True},
                "libmoe_vlm": {"temperature": 0.3, "renormalise": False},
            },
            score="cosine",
        ),
        parameters=XMoEParameters,
        problems=_xmoe,
        parameter_count=_xmoe_count,
        scores=("cosine",),
        printed=("XMoE",),
    ),
    RouterKind(
        "sharede_v2",
        variants=_variants(shared_experts=2),
        needs=("shared_experts",),
        scores=("softmax",),
        printed=("SharedE-V2",),
    ),
    RouterKind(
        "sharede_v3",
        variants=_variants(shared_experts=2, score="sigmoid"),
        needs=("shared_experts",),
        scores=("sigmoid",),
        printed=("SharedE-V3",),
    ),
    RouterKind(
        "moepp",
        code="jobs.moe.routers:MoEPlusPlus",
        variants=_variants(
            {"paper": {"renormalise": False}, "reference": {"renormalise": True}, "mixtral": {"renormalise": True}},
            zero_experts=1,
            copy_experts=1,
            constant_experts=2,
            gating_residual=True,
        ),
        problems=_moepp,
        ids=_moepp_ids,
        parameter_count=_moepp_count,
        first_layer_lacks=_moepp_residual,
        scores=("softmax",),
        own=("zero_experts", "copy_experts", "constant_experts", "gating_residual", "gating_layers"),
        records=("cost",),
        biased=True,
        standardised=True,
        printed=("MoE++", "MOE++"),
    ),
    RouterKind(
        "tc_moe",
        code="jobs.moe.routers:TCMoE",
        variants=_variants(null_experts=1, renormalise=False),
        problems=_tc_moe,
        ids=_tc_moe_ids,
        scores=("softmax",),
        needs=("null_experts",),
        own=("null_experts",),
        records=("null",),
        printed=("TC-MoE", "TC-MOE"),
    ),
    RouterKind("expert_choice", variants=_variants(choice="expert", renormalise=False)),
    RouterKind("word", variants=_variants(unit="word")),
    RouterKind("sentence", variants=_variants(unit="sentence")),
    RouterKind("aux_free", variants=_variants(score="sigmoid", balance_bias=True)),
    RouterKind(
        "sparsemixer",
        code="jobs.moe.routers.sparsemixer:Sparsemixer",
        variants=_variants(renormalise=False),
        parameters=SparsemixerParameters,
        problems=_sparsemixer,
        scores=("softmax",),
        whole=True,
    ),
    RouterKind(
        "inkling",
        code="jobs.moe.routers.inkling:Inkling",
        variants=_variants(score="sigmoid", balance_bias=True, shared_experts=2),
        problems=_inkling,
        parameter_count=_inkling_count,
        scores=("sigmoid",),
        needs=("shared_experts",),
        whole=True,
    ),
    RouterKind(
        "zaya",
        code="jobs.moe.routers.zaya:Zaya",
        variants=_variants(renormalise=False, balance_bias=True),
        parameters=ZayaParameters,
        ids=_zaya_ids,
        parameter_count=_zaya_count,
        first_layer_lacks=_zaya_scale,
        scores=("softmax",),
        biased=True,
    ),
    RouterKind("c2r", derived=_half_of_the_others, needs=("collaboration_top",)),
)

# What the published tables print -> preset.
PRINTED: Mapping[str, str] = {name: kind.name for kind in BUILT_IN for name in kind.printed}
ROUTERS = Registry("routers", "preset", RouterKind, {kind.name: kind for kind in BUILT_IN})
# Fields of the block that single kinds have: field -> preset.
OWNERS: Mapping[str, str] = {name: kind.name for kind in BUILT_IN for name in kind.own}


def kind_of(moe: MoESpec) -> RouterKind:
    """Return the router of a block; MoegridError when nobody provides it."""
    return ROUTERS.get(moe.preset)
