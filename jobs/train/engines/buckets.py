"""Gradients summed over ranks in buckets while the last backward pass of a step still runs.

The buckets and their order depend on the trainable parameters alone, so that a resumed run sums in the order of one
that never stopped (torch's own DistributedDataParallel regroups its buckets after the first iteration). A parameter as
large as a bucket is summed where its gradient lies; of the others at most `IN_FLIGHT` buckets are copied at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20
IN_FLIGHT = 2


def cut_buckets(tensors: Sequence[Tensor], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Return the buckets of fp32 gradients of `tensors` as positions, in the order in which they are complete.

    Backward passes go from the last to the first. A gradient of `limit` bytes or more has a bucket of its own; the
    others share buckets of up to `limit` bytes.
    """
    buckets: list[list[int]] = []
    shared: list[int] = []
    used = 0
    for position in reversed(range(len(tensors))):
        size = tensors[position].numel() * 4
        if size >= limit:
            buckets.append([position])
            continue
        if shared and used + size > limit:
            buckets.append(shared)
            shared, used = [], 0
        shared.append(position)
        used += size
    return sorted([*buckets, shared] if shared else buckets, key=min, reverse=True)


class GradientSums:
    """Sums the `.grad` of fp32 tensors over ranks, in place; a tensor without one adds zeros and gets the sum.

    Every rank calls `arrived` or not, as its backward pass goes, and then `finish`: buckets leave in one order on all
    ranks, each when all of its gradients and all buckets before it are there. They have a process group of their own,
    which other collectives of a backward pass cannot get in between.
    """

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, limit: int = BUCKET_BYTES) -> None:
        self._tensors, self._group = list(tensors), group
        self._buckets = cut_buckets(self._tensors, limit)
        self._bucket_of = {position: number for number, bucket in enumerate(self._buckets) for position in bucket}
        self._missing: list[int] = []
        self._next = 0
        self._flying: deque[tuple[list[Tensor], Tensor | None, dist.Work]] = deque()
        self.begin()

    def begin(self) -> None:
        """Expect every gradient once."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0

    def arrived(self, position: int) -> None:
        """Take note that the gradient of the tensor at `position` is complete."""
        self._missing[self._bucket_of[position]] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._send()

    def finish(self) -> None:
        """Send what has not left and wait for all sums."""
        while self._next < len(self._buckets):
            self._send()
        while self._flying:
            self._land()
        self.begin()

    def _send(self) -> None:
        while len(self._flying) >= IN_FLIGHT:
            self._land()
        members = [self._tensors[position] for position in self._buckets[self._next]]
        self._next += 1
        for tensor in members:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in members if tensor.grad is not None]
        if len(gradients) == 1 and gradients[0].is_contiguous():
            flat, copied = gradients[0], None
        else:
            flat = copied = torch.cat([gradient.reshape(-1) for gradient in gradients])
        all_reduce = dist.all_reduce(flat, group=self._group, async_op=True)
        assert all_reduce is not None
        self._flying.append((gradients, copied, all_reduce))

    def _land(self) -> None:
        gradients, copied, all_reduce = self._flying.popleft()
        all_reduce.wait()  # the name is what a message about a hanging step shows
        if copied is not None:
            parts = copied.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
