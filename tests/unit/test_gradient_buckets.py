"""Gradients are summed over ranks bucket by bucket, in one order whatever the order in which they arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.train.engines import buckets
from jobs.train.engines.buckets import GradientSums, cut_buckets

SIZES = (3, 5, 40, 2, 6)  # of fp32: with 32 bytes a bucket the third has one of its own


class Done:
    def wait(self) -> None: ...


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what was summed, in order; two ranks with equal gradients."""
    sizes: list[int] = []

    def all_reduce(tensor: Tensor, **_: Any) -> Done:
        sizes.append(tensor.numel())
        tensor.mul_(2)
        return Done()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sizes


def tensors() -> list[Tensor]:
    return [torch.zeros(size) for size in SIZES]


def test_buckets_go_backwards_and_a_large_gradient_is_alone() -> None:
    assert cut_buckets(tensors(), 32) == [[4, 3], [2], [1, 0]]
    assert cut_buckets([], 32) == []


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (0, 1, 2, 3, 4), (2, 0, 4, 1, 3)])
def test_the_order_of_sums_is_not_that_of_arrival(sent: list[int], order: tuple[int, ...]) -> None:
    own = tensors()
    sums = GradientSums(own, None, 32)  # type: ignore[arg-type]
    for step in (1.0, 3.0):
        for position in order:
            own[position].grad = torch.full_like(own[position], step + position)
            sums.arrived(position)
        sums.finish()
        assert sent == [8, 40, 8]
        sent.clear()
        for position, tensor in enumerate(own):
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.full_like(tensor, 2 * (step + position)))
            tensor.grad = None


def test_sums_leave_while_others_are_still_to_come(sent: list[int]) -> None:
    own = tensors()
    sums = GradientSums(own, None, 32)  # type: ignore[arg-type]
    for position in (4, 3):
        own[position].grad = torch.ones_like(own[position])
        sums.arrived(position)
    assert sent == [8]
    # No gradient of the others on this rank: it adds zeros to the sums of those that have one.
    sums.finish()
    assert sent == [8, 40, 8]
    assert all(tensor.grad is not None for tensor in own)


def test_a_large_gradient_is_summed_in_place_and_few_copies_live(
    sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [torch.zeros(8) for _ in range(6)] + [torch.zeros(2, 2) for _ in range(8)]
    flying: list[int] = []
    sums = GradientSums(own, None, 32)  # type: ignore[arg-type]
    land = sums._land

    def landing() -> None:
        flying.append(len(sums._flying))
        land()

    monkeypatch.setattr(sums, "_land", landing)
    before = {}
    for position in reversed(range(len(own))):
        own[position].grad = torch.ones_like(own[position])
        before[position] = own[position].grad.data_ptr()
        sums.arrived(position)
    sums.finish()
    assert max(flying) == buckets.IN_FLIGHT
    assert all(own[position].grad.data_ptr() == before[position] for position in range(6))
