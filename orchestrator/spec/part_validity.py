"""The validity matrix of the neutral parts of a block: what each of them does not go with, and why."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.catalog.frames import NONE, PLACES
from orchestrator.catalog.gates import GATES
from orchestrator.catalog.overflows import NONE as NO_OVERFLOW
from orchestrator.catalog.routers import RouterKind
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.files.problems import Fault
from orchestrator.spec.model import Moe, MoESpec

_DEFAULT = MoESpec()
# Parts of selecting and weighing, which expert choice and routers that do both in one have their own of.
OF_TOKEN_CHOICE = ("select_by", "weight_norm", "expert_scale", "overflow", "hash_layers")
# Those that only code of the plain routers reads.
OF_PLAIN = ("select_by", "weight_norm", "hash_layers")
_ROUTED = ("routed_input", "latent_input", "expert_output", "routed_output")


def copied_faults(moe: MoESpec) -> Iterator[Fault]:
    """Yield what the parts of a block do not go with where feed-forwards of a vision side become its experts."""
    for name in ("latent_size", "shared_width", *PLACES):
        if getattr(moe, name) != getattr(_DEFAULT, name):
            yield Fault(f"moe.{name}", f"{name} with vision.upcycle: experts there are copies of a feed-forward alone")


def part_faults(kind: RouterKind, moe: Moe) -> Iterator[Fault]:
    """Yield what the parts of a block that routes do not go with."""
    used = {name for name in (*OF_TOKEN_CHOICE, "selection") if getattr(moe, name) != getattr(_DEFAULT, name)}
    who = f"preset {moe.preset!r}"
    for name in (*OF_TOKEN_CHOICE, "selection"):
        shown = f"{name} {getattr(moe, name)!r}"
        if name not in used or (name == "selection" and moe.choice == "expert"):
            continue  # the latter is told with the other words of choice
        if moe.choice == "expert":
            yield Fault(name, f"{shown} applies to choice 'token' only")
        elif kind.whole:
            yield Fault(name, f"{shown} with {who}: it selects and weighs in one")
        elif name in OF_PLAIN and not kind.plain:
            yield Fault(name, f"{shown} with {who}: it has a router of its own")
    yield from _routing_faults(kind, moe, who)
    yield from _expert_faults(kind, moe, who)
    yield from (Fault("gate", message) for message in GATES.get(moe.gate).faults(kind.ids(moe), moe.gate_parameters))


def _routing_faults(kind: RouterKind, moe: Moe, who: str) -> Iterator[Fault]:
    if kind.whole:
        for name in ("n_group", "collaboration_top"):
            if getattr(moe, name) > 1:
                yield Fault(name, f"{name} with {who}: it selects and weighs in one")
    if moe.weight_norm != 1 and not moe.renormalise:
        yield Fault("weight_norm", "weight_norm says by what weights are renormalised: it needs renormalise")
    if moe.select_by != _DEFAULT.select_by and not moe.balance_bias and kind.plain and moe.choice == "token":
        yield Fault("select_by", "select_by says what the balancing bias is added to: it needs balance_bias")
    if moe.group_mask != _DEFAULT.group_mask and moe.n_group == 1:
        yield Fault("group_mask", "group_mask says how other groups are masked: it needs n_group > 1")
    if moe.logit_std and not (kind.plain or kind.standardised):
        yield Fault("logit_std", f"logit_std with {who}: its scores are not of the logits alone")
    if SELECTIONS.get(moe.selection).sampled and moe.balance_bias:
        message = f"selection {moe.selection!r} draws by scores: balance_bias would make them no probabilities"
        yield Fault("selection", message)
    if moe.overflow != NO_OVERFLOW:
        if kind.ids(moe) != moe.num_experts:
            yield Fault("overflow", f"overflow {moe.overflow!r} with {who}: its ids are not all experts of equal cost")
        if moe.unit != "token":
            yield Fault("overflow", f"overflow {moe.overflow!r} with unit {moe.unit!r}: it would split the spans")
    elif moe.renormalise_kept:
        yield Fault("renormalise_kept", "renormalise_kept is about dropped assignments: it needs an overflow")
    if moe.renormalise_kept and not moe.renormalise:
        yield Fault("renormalise_kept", "renormalise_kept says when weights are renormalised: it needs renormalise")
    if moe.hash_layers:
        for name in ("n_group", "collaboration_top"):
            if getattr(moe, name) > 1:
                yield Fault("hash_layers", f"hash_layers with {name}: experts looked up by token id are not limited")
        if moe.unit != "token":
            yield Fault("hash_layers", f"hash_layers with unit {moe.unit!r}: they look single tokens up")


def _expert_faults(kind: RouterKind, moe: Moe, who: str) -> Iterator[Fault]:
    if moe.shared_width and not moe.shared_experts:
        yield Fault("shared_width", "shared_width is of shared experts: it needs shared_experts")
    framed = [place for place in PLACES if getattr(moe, place) != NONE]
    for place in framed:
        if PLACES[place] == "shared_expert" and not moe.shared_experts:
            yield Fault(place, f"{place} stands around shared experts: it needs shared_experts")
    if moe.latent_input != NONE and not moe.latent_size:
        yield Fault("latent_input", "latent_input stands in the latent space: it needs latent_size")
    if kind.ids(moe) == moe.num_experts:
        return
    if moe.weights_on != _DEFAULT.weights_on:
        message = f"weights_on {moe.weights_on!r} with {who}: ids without an expert have no input"
        yield Fault("weights_on", message)
    for name in ("latent_size", *(place for place in _ROUTED if place in framed)):
        if getattr(moe, name) != getattr(_DEFAULT, name) and not kind.biased:
            yield Fault(name, f"{name} with {who}: ids without an expert would not be in it")
