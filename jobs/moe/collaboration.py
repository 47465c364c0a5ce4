"""Collaboration-constrained routing (C2R): which experts may serve a token together with its first choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.moe.block import MoEBlock


def set_collaboration(block: MoEBlock, lists_NT: Tensor) -> None:
    """Set a block's C2R lists; a preset `c2r` saves them with the model. Legal: k-1 <= T <= N-1."""
    moe, router = block.moe, block.router
    if moe.choice == "expert" or router.physical is not None or moe.n_group > 1:
        raise MoegridError("collaboration lists apply to plain token choice without groups only")
    if lists_NT.dim() != 2 or lists_NT.is_floating_point():
        raise MoegridError(f"collaboration lists are {tuple(lists_NT.shape)} {lists_NT.dtype}", hint="[N,T] integers")
    length = lists_NT.shape[1]
    if not moe.top_k - 1 <= length <= moe.num_experts - 1 or lists_NT.shape[0] != moe.num_experts:
        raise MoegridError(
            f"collaboration lists have shape {tuple(lists_NT.shape)}",
            cause=f"needed: {moe.num_experts} lists of {moe.top_k - 1} to {moe.num_experts - 1} experts",
        )
    if bool(((lists_NT < 0) | (lists_NT >= moe.num_experts)).any()):
        raise MoegridError("collaboration lists name an expert that is not there", hint=f"0..{moe.num_experts - 1}")
    own = torch.arange(moe.num_experts, device=lists_NT.device).unsqueeze(1)
    if bool((lists_NT == own).any()) or bool((lists_NT.sort(1).values.diff(dim=1) == 0).any()):
        raise MoegridError("a collaboration list names its own expert, or one twice", hint="T distinct other experts")
    allowed = torch.zeros(moe.num_experts, moe.num_experts, dtype=torch.bool, device=router.device)
    allowed.scatter_(1, lists_NT.to(router.device), True)
    router.allowed = allowed


def collaboration_lists(indices_TK: Tensor, num_experts: int, length: int) -> Tensor:
    """Return each expert's Top-T list [N,T] from routed slots [T,K] of a profiling sample (-1 = empty or padding).

    Experts are sorted by how often they serve the same token, descending, ties to the lower index, itself excluded.
    """
    chosen = torch.zeros(len(indices_TK), num_experts + 1, dtype=torch.float32, device=indices_TK.device)
    chosen.scatter_(1, torch.where(indices_TK < 0, num_experts, indices_TK), 1.0)
    together = chosen[:, :num_experts].t() @ chosen[:, :num_experts]
    together.fill_diagonal_(-1.0)
    return torch.sort(together, dim=1, descending=True, stable=True).indices[:, :length]
