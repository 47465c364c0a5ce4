"""Upcycling (Komatsuzaki et al. 2023): how experts are made of a dense feed-forward, and what that changes at step 0.

A feed-forward of `parts` times an expert's width is cut into so many segments, which the experts hold in turn.
Source of virtual groups and of the scale of weights: He et al. 2024 (arXiv 2410.07524), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from orchestrator.catalog.frames import NONE, PLACES
from orchestrator.catalog.overflows import NONE as NO_OVERFLOW
from orchestrator.catalog.routers import kind_of
from orchestrator.spec.rules import FRACTION, NOT_NEGATIVE

if TYPE_CHECKING:
    from orchestrator.spec.model import Moe, MoESpec

REDRAWN = 0.5


@dataclass(frozen=True, slots=True)
class UpcyclingSpec:
    """What is done to the copies beside what `upcycle` says."""

    groups: bool = False
    """Virtual groups: experts that hold all segments of a feed-forward begin with one row of the router."""
    scale_weights: bool = False
    """Scale the experts' last matrices so that what the router's weights and the cut take is given back."""
    noise: Annotated[float, NOT_NEGATIVE] = 0.0
    """Normal noise on each expert's copies, relative to the standard deviation of the matrix, 0 = none."""
    redrawn: Annotated[float, FRACTION] = REDRAWN
    """Share of an expert's hidden units that `partial` draws anew (drop-upcycling)."""


def weight_scale(moe: Moe, parts: int) -> float:
    """Return by what the experts' last matrices are multiplied, of experts that hold one segment of `parts` each.

    Renormalised weights sum to 1 over a token's `top_k` experts, which hold `top_k / parts` copies of the feed-forward
    together: its output comes back divided by `parts`. Weights of a softmax over all are 1 / num_experts each while
    the router is undecided.
    """
    taken = 1 / parts if moe.renormalise else moe.top_k / parts / moe.num_experts
    return 1 / (taken * moe.routed_scaling)


def upcycling_problems(moe: MoESpec, given: UpcyclingSpec, parts: int) -> Iterator[tuple[str, str]]:
    """Yield (field of `UpcyclingSpec`, what does not go with a feed-forward of `parts` segments)."""
    if given.groups and moe.num_experts % parts:
        yield "groups", f"virtual groups of {parts} segments do not divide {moe.num_experts} experts"
    elif given.groups and moe.top_k % parts:
        yield "groups", f"top_k {moe.top_k} takes no whole virtual groups of {parts} segments"


def change_at_start(how: str, moe: Moe, given: UpcyclingSpec, parts: int) -> str:
    """Return how a model that was just upcycled differs from the dense one, "" where its outputs are the same."""
    if how == "shared_only":
        return "the shared experts hold the feed-forward, routed experts that were drawn are added"
    changes = []
    if how == "partial":
        changes.append(f"{given.redrawn:.0%} of each expert's hidden units are drawn anew")
    if given.noise:
        changes.append(f"noise of {given.noise:g} standard deviations on the experts")
    if parts > 1 and not (given.groups and moe.top_k % parts == 0):
        changes.append(f"a token's {moe.top_k} experts hold any {moe.top_k} of the {parts} segments")
    if not given.scale_weights and parts > 1:
        changes.append(f"the routed output is 1/{parts} of the feed-forward's")
    if not moe.renormalise and not (given.scale_weights and moe.router_init_std == 0):
        scaled = "on average that" if given.scale_weights else "the sum of its router's weights times that"
        changes.append(f"a token's output is {scaled} of the feed-forward")
    if moe.routed_scaling != 1 and not given.scale_weights:
        changes.append(f"the routed output is multiplied by {moe.routed_scaling:g}")
    if moe.shared_experts:
        changes.append("the shared experts' copy is combined with the routed ones'")
    framed = [place for place in PLACES if getattr(moe, place) not in (NONE, "bias")]  # a bias begins with 0
    if framed:
        changes.append(f"the copies stand between norms ({', '.join(framed)})")
    if moe.weights_on == "input":
        changes.append("weights multiply what the copies are given")
    if moe.renormalise and moe.weight_norm != 1:
        changes.append(f"a token's weights have a {moe.weight_norm:g}-norm of 1, not a sum of 1")
    if moe.overflow != NO_OVERFLOW:
        changes.append("what is above an expert's capacity is dropped")
    if kind_of(moe).ids(moe) != moe.num_experts:
        changes.append("ids without a copy take a part of the weights")
    return "; ".join(changes)
