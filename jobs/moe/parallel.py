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
    meanwhile: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return sum over a token's slots of weight * after(expert(x)) [T,D], each expert computed where it is.

    `after` is computed where the token is.
    `plan` sorts the slots by all N experts. Collective: every rank of the group calls it, with tokens or without.
    `meanwhile` is called while the tokens are on their way, and its backward pass runs while their gradients are.
    """
    own, sent, received = _counts(plan, group)
    rows = sum(sent)
    order = plan.order[:rows]
    way = _Way(sent, received, group)
    leaving = _Depart.apply(x_TD.index_select(0, plan.token[:rows]), way)  # type: ignore[no-untyped-call]
    meanwhile()
    there: Tensor = _Arrive.apply(leaving, way)  # type: ignore[no-untyped-call]
    # What arrives is sorted by its source, then by expert.
    expert = torch.arange(own.numel(), device=x_TD.device) % (own.numel() // group.size)
    expert = expert.repeat_interleave(own, output_size=len(there)).unsqueeze(1)
    y = local(there, expert, weights_TK.new_ones(len(there), 1))
    way = _Way(received, sent, group)
    back: Tensor = _Arrive.apply(_Depart.apply(y, way), way)  # type: ignore[no-untyped-call]
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


@dataclass(slots=True)
class _Way:
    """One exchange: runs of rows sent to and received from each rank of a group; gradients take the way back."""

    sent: list[int]
    received: list[int]
    group: ExpertGroup
    flying: tuple[Tensor, Tensor, dist.Work] | None = None  # what is sent, where it arrives

    def depart(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send rows without waiting, and return the memory that they arrive in."""
        arriving = rows.new_empty(sum(received), rows.shape[1])
        rows = rows.contiguous()
        work = dist.all_to_all_single(arriving, rows, received, sent, group=self.group.group, async_op=True)
        assert work is not None
        self.flying = rows, arriving, work
        return arriving

    def arrive(self) -> Tensor:
        """Wait for what was sent last, and return it."""
        assert self.flying is not None
        _, arrived, work = self.flying
        work.wait()
        self.flying = None
        return arrived


class _Ctx(Protocol):
    way: _Way


class _Depart(torch.autograd.Function):
    """Rows set out; in the backward pass their gradients, which set out in `_Arrive`'s, arrive."""

    @staticmethod
    def forward(ctx: _Ctx, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.depart(rows, way.sent, way.received)

    @staticmethod
    def backward(ctx: _Ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.way.arrive(), None


class _Arrive(torch.autograd.Function):
    """Rows arrive; in the backward pass their gradients set out."""

    @staticmethod
    def forward(ctx: _Ctx, arriving: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        way.arrive()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: _Ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.way.depart(gradient, ctx.way.received, ctx.way.sent)
        return gradient, None
