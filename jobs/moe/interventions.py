"""Interventions on a built model: cheap switches of its routers, on inside a `with` block and off after it.

They change which experts are chosen and with what weights; weights of the model never change. Layers are indices into
`model.moe_blocks` (as in `Output.routings`); `model` may also be one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.moe.collaboration import set_collaboration
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.moe.block import MoEBlock


@dataclass(frozen=True)
class Switches:
    """What is on in one router; the defaults change nothing."""

    removed: tuple[int, ...] = ()  # physical experts
    temperature: float = 1.0
    random_seed: int | None = None
    drop: int = 0


@contextmanager
def pruned(model: nn.Module, experts: Mapping[int, int | Sequence[int]]) -> Iterator[None]:
    """Remove experts {layer: expert or experts}: -inf in the logits and in the biased selection score.

    Experts are physical ones: of TC-MoE both signs go, of MoE++ only full experts can.
    """
    blocks = _blocks(model)
    changes: dict[int, dict[str, Any]] = {}
    for layer, removed in experts.items():
        if not 0 <= layer < len(blocks):
            raise MoegridError(f"there is no MoE layer {layer}", cause=f"the model has {len(blocks)}")
        ids = (removed,) if isinstance(removed, int) else tuple(removed)
        moe = blocks[layer].moe
        if any(not 0 <= expert < moe.num_experts for expert in ids):
            raise MoegridError(f"layer {layer} has no expert {ids}", cause=f"its experts are 0..{moe.num_experts - 1}")
        changes[layer] = {"removed": ids}
    with _switched(blocks, changes):
        yield


@contextmanager
def random_routing(model: nn.Module, seed: int) -> Iterator[None]:
    """Give a token's own weights, in rank order, to as many distinct uniform experts; same seed, same experts."""
    blocks = _blocks(model)
    with _switched(blocks, {layer: {"random_seed": seed} for layer in range(len(blocks))}):
        yield


@contextmanager
def dropped(model: nn.Module, n: int) -> Iterator[None]:
    """Drop each token's best `n` experts: ranks n+1..n+k serve with their scores, renormalised if the router does."""
    blocks = _blocks(model)
    for block in blocks:
        if block.moe.choice == "expert":
            raise MoegridError("dropping top choices needs token choice", cause="expert choice ranks tokens")
        if block.moe.top_k + n > block.router.num_ids:
            raise MoegridError(f"cannot drop the top {n}: top_k + {n} exceeds the {block.router.num_ids} experts")
    with _switched(blocks, {layer: {"drop": n} for layer in range(len(blocks))}):
        yield


@contextmanager
def temperature(model: nn.Module, tau: float) -> Iterator[None]:
    """Divide the router logits by `tau`."""
    if not tau > 0:
        raise MoegridError(f"temperature {tau} must be positive")
    blocks = _blocks(model)
    with _switched(blocks, {layer: {"temperature": tau} for layer in range(len(blocks))}):
        yield


@contextmanager
def c2r(model: nn.Module, lists: Mapping[int, Tensor]) -> Iterator[None]:
    """Limit collaboration by {layer: lists [N,T]}: the second to k-th choice come from the first choice's list."""
    blocks = _blocks(model)
    before = {layer: getattr(blocks[layer].router, "allowed", None) for layer in lists}
    try:
        for layer, lists_NT in lists.items():
            set_collaboration(blocks[layer], lists_NT)
        yield
    finally:
        for layer, allowed in before.items():
            router = blocks[layer].router
            if allowed is None:
                router.__dict__.pop("allowed", None)
            else:
                router.allowed = allowed


def _blocks(model: nn.Module) -> list[MoEBlock]:
    blocks = getattr(model, "moe_blocks", None)
    return [model] if blocks is None else blocks  # type: ignore[list-item]


@contextmanager
def _switched(blocks: Sequence[MoEBlock], changes: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
    """Set switches for the time of the `with` block; nested interventions add up."""
    before = {layer: blocks[layer].router.switches for layer in changes}
    try:
        for layer, change in changes.items():
            blocks[layer].router.switches = replace(before[layer], **change)
        yield
    finally:
        for layer, switches in before.items():
            blocks[layer].router.switches = switches


def random_ids(indices_TK: Tensor, num_ids: int, keys: Tensor | None, seed: int, layer: int) -> Tensor:
    """Return distinct uniform ids for the filled slots.

    A pure function of (seed, layer, token key): a token gets the same experts whatever the batch, padding or cache.
    """
    if keys is None:
        keys = torch.arange(len(indices_TK), device=indices_TK.device)
    start = _mix(torch.tensor(seed * 1_000_003 + layer, device=keys.device))
    noise = _mix(_mix(keys + start).unsqueeze(-1) + torch.arange(num_ids, device=keys.device))
    ids = torch.sort(noise, dim=-1, stable=True).indices[:, : indices_TK.shape[1]]
    return torch.where(indices_TK < 0, -1, ids)


def _mix(values: Tensor) -> Tensor:
    """Scramble int64 values (the finaliser of splitmix64; int64 arithmetic wraps)."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return values ^ ((values >> 31) & 0x1FFFFFFFF)
