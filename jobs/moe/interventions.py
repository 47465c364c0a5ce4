"""Interventions on a built model: cheap switches of its routers, on inside a `with` block and off after it.

They change which experts are chosen and with what weights; weights of the model never change. Nested ones add up:
removed experts stay removed, temperatures multiply, dropped ranks are summed; of two seeds or lists the inner holds.
Layers are indices into `model.moe_blocks` (as in `Output.routings`); `model` may also be one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.moe.collaboration import set_collaboration
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.moe.block import MoEBlock


@contextmanager
def pruned(model: nn.Module, experts: Mapping[int, int | Sequence[int]]) -> Iterator[None]:
    """Remove experts {layer: expert or experts}: -inf in the logits and in the biased selection score.

    Experts are physical ones: of TC-MoE both signs go, of MoE++ only full experts can.
    """
    blocks = _blocks(model)
    changes: dict[int, dict[str, object]] = {}
    for layer, removed in experts.items():
        _check_layer(blocks, layer)
        ids = tuple(torch.as_tensor(removed).reshape(-1).tolist())
        moe = blocks[layer].moe
        if any(not isinstance(expert, int) or not 0 <= expert < moe.num_experts for expert in ids):
            raise MoegridError(f"layer {layer} has no expert {ids}", cause=f"its experts are 0..{moe.num_experts - 1}")
        gone = {*blocks[layer].router.switches.removed, *ids}
        if blocks[layer].router.physical is None and len(gone) == moe.num_experts:
            raise MoegridError(f"layer {layer} would have no expert left")
        changes[layer] = {"removed": tuple(sorted(gone))}
    with _switched(blocks, changes):
        yield


@contextmanager
def random_routing(model: nn.Module, seed: int) -> Iterator[None]:
    """Give a token's own weights, in rank order, to as many distinct uniform experts; same seed, same experts."""
    blocks = _blocks(model)
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise MoegridError(f"the seed of random routing is {seed!r}", hint="an integer from 0 to 2**32 - 1")
    with _switched(blocks, {layer: {"random_seed": seed} for layer in range(len(blocks))}):
        yield


@contextmanager
def dropped(model: nn.Module, n: int) -> Iterator[None]:
    """Drop each token's best `n` experts: ranks n+1..n+k serve with their scores, renormalised if the router does."""
    blocks = _blocks(model)
    if not isinstance(n, int) or n < 0:
        raise MoegridError(f"cannot drop the top {n}", hint="n counts each token's best experts: 1 or 2")
    for block in blocks:
        if block.moe.choice == "expert":
            raise MoegridError("dropping top choices needs token choice", cause="expert choice ranks tokens")
    changes = {layer: {"drop": block.router.switches.drop + n} for layer, block in enumerate(blocks)}
    for layer, block in enumerate(blocks):
        drop, choices = changes[layer]["drop"], block.router.choices
        if block.moe.top_k + drop > choices:
            raise MoegridError(f"cannot drop the top {drop}: top_k + {drop} exceeds the {choices} experts of a choice")
    with _switched(blocks, changes):
        yield


@contextmanager
def temperature(model: nn.Module, tau: float) -> Iterator[None]:
    """Divide the router logits by `tau`."""
    if not tau > 0:
        raise MoegridError(f"temperature {tau} must be positive")
    blocks = _blocks(model)
    with _switched(
        blocks, {layer: {"temperature": block.router.switches.temperature * tau} for layer, block in enumerate(blocks)}
    ):
        yield


@contextmanager
def c2r(model: nn.Module, lists: Mapping[int, Tensor]) -> Iterator[None]:
    """Limit collaboration by {layer: lists [N,T]}: the second to k-th choice come from the first choice's list."""
    blocks = _blocks(model)
    for layer in lists:
        _check_layer(blocks, layer)
    before = {layer: blocks[layer].router.allowed for layer in lists}
    try:
        for layer, lists_NT in lists.items():
            set_collaboration(blocks[layer], lists_NT)
        yield
    finally:
        for layer, allowed in before.items():
            blocks[layer].router.allowed = allowed


def _blocks(model: nn.Module) -> list[MoEBlock]:
    blocks = getattr(model, "moe_blocks", None)
    if blocks is None and not hasattr(model, "router"):
        raise MoegridError("interventions need a model with MoE blocks, or one such block")
    return [model] if blocks is None else blocks  # type: ignore[list-item]


def _check_layer(blocks: Sequence[MoEBlock], layer: int) -> None:
    if not 0 <= layer < len(blocks):
        raise MoegridError(f"there is no MoE layer {layer}", cause=f"the model has {len(blocks)}")


@contextmanager
def _switched(blocks: Sequence[MoEBlock], changes: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
    """Set switches for the time of the `with` block."""
    before = {layer: blocks[layer].router.switches for layer in changes}
    try:
        for layer, change in changes.items():
            blocks[layer].router.switches = replace(before[layer], **change)
        yield
    finally:
        for layer, switches in before.items():
            blocks[layer].router.switches = switches
