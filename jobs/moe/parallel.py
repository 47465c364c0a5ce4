"""Expert parallelism: the ranks of a group hold different experts, and tokens travel to theirs and back.

As torchtitan does it: tokens sorted by expert, an exchange of counts, one of tokens, the local experts, and the reverse
exchange. Routing, its losses and what it learns stay with the rank whose tokens they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.moe.dispatch import Dispatch
from jobs.moe.host import is_fake
from orchestrator.errors import MoegridError

# (x [R,D], local expert of each row [R,1], weights [R,1]) -> [R,D]
Local = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The ranks among which the experts are dealt: `size` of them, of which this is number `rank`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def first(self, num_experts: int) -> int:
        """Return the first of this rank's experts; each rank has as many. MoegridError where that cannot be."""
        if num_experts % self.size:
            raise MoegridError(
                f"{num_experts} experts cannot be dealt to {self.size} ranks",
                hint="execution.parallel.expert must divide model.moe.num_experts",
            )
        return self.rank * (num_experts // self.size)


def keep_own(experts: nn.Module, num_experts: int, group: ExpertGroup) -> None:
    """Leave a module of experts the weights of this rank's alone: a run of the first dimension of each [N,...]."""
    first = group.first(num_experts)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        own = parameter.detach()[first : first + num_experts // group.size].clone()
        experts.register_parameter(name, nn.Parameter(own, parameter.requires_grad))


def travel(
    x_TD: Tensor,
    weights_TK: Tensor,
    plan: Dispatch,
    group: ExpertGroup,
    local: Local,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return sum over a token's slots of weight * after(expert(x)) [T,D], each expert computed where it is.

    `after` is computed where the token is.
    `plan` sorts the slots by all N experts. Collective: every rank of the group calls it, with tokens or without.
    """
    own, sent, received = _counts(plan, group)
    rows = sum(sent)
    order = plan.order[:rows]
    there = _exchange(x_TD.index_select(0, plan.token[:rows]), sent, received, group)
    # What arrives is sorted by its source, then by expert.
    expert = torch.arange(own.numel(), device=x_TD.device) % (own.numel() // group.size)
    expert = expert.repeat_interleave(own, output_size=len(there)).unsqueeze(1)
    y = local(there, expert, weights_TK.new_ones(len(there), 1))
    back = _exchange(y, received, sent, group)
    if after is not None:
        back = after(back)
    weighted = back * weights_TK.reshape(-1).index_select(0, order).to(back.dtype).unsqueeze(1)
    slots = weighted.new_zeros(len(plan.order), weighted.shape[1]).index_copy(0, order, weighted)
    return slots.view(len(x_TD), plan.slots, weighted.shape[1]).sum(1)


def _counts(plan: Dispatch, group: ExpertGroup) -> tuple[Tensor, list[int], list[int]]:
    """Return (rows of each source and local expert [size * N/size], rows sent to and received from each rank)."""
    own = torch.empty_like(plan.counts)
    dist.all_to_all_single(own, plan.counts, group=group.group)
    if is_fake(own):  # a simulation assumes an even load
        even = [len(plan.order) // group.size] * group.size
        return own, even, even
    sent, received = torch.stack([plan.counts, own]).view(2, group.size, -1).sum(-1).tolist()
    return own, sent, received


class _Way(Protocol):
    """What an exchange remembers for the way back."""

    sent: list[int]
    received: list[int]
    group: ExpertGroup


class _Exchange(torch.autograd.Function):
    """Send runs of rows to the ranks of a group, in their order; gradients take the way back."""

    @staticmethod
    def forward(ctx: _Way, rows: Tensor, sent: list[int], received: list[int], group: ExpertGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _send(rows, sent, received, group)

    @staticmethod
    def backward(ctx: _Way, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _send(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: ExpertGroup) -> Tensor:
    moved: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return moved


def _send(rows: Tensor, sent: list[int], received: list[int], group: ExpertGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group.group)
    return arrived
