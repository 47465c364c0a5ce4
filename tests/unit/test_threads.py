"""Pieces of work on several threads: each done once, with the caller's modes, and nothing left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from jobs import threads
from jobs.models.loss import CPU_CHUNK, linear_cross_entropy
from jobs.moe.experts import Experts
from jobs.threads import FEWEST_ROWS, for_each


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SIZES = [FEWEST_ROWS, 0, 3, 40, 500, 7, 0, 90, 1]


def shared(work: Callable[[int], Any], sizes: list[int] = SIZES) -> set[int]:
    """Run `work` so that two threads must take part: the first two pieces wait for each other."""
    meeting = threading.Barrier(2)
    met: set[int] = set()

    def run(i: int) -> None:
        if len(met) < 2:
            met.add(threading.get_ident())
            meeting.wait(20)
        work(i)

    for_each(run, sizes)
    return met


def test_every_piece_with_rows_is_done_once_by_whoever_is_free() -> None:
    done: list[int] = []
    assert len(shared(done.append)) == 2
    assert sorted(done) == [i for i, size in enumerate(SIZES) if size]


def test_kernels_of_a_piece_have_one_core_and_the_callers_have_theirs_again() -> None:
    seen: list[int] = []
    shared(lambda i: seen.append(torch.get_num_threads()))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_an_error_in_a_piece_reaches_the_caller_and_threads_are_restored() -> None:
    main = threading.get_ident()

    def fail_in_helper(i: int) -> None:
        if threading.get_ident() != main:
            raise ValueError("piece")

    with pytest.raises(ValueError, match="piece"):
        shared(fail_in_helper)
    assert torch.get_num_threads() == 2

    def fail_here(i: int) -> None:
        if threading.get_ident() == main:
            raise ValueError("piece")

    with pytest.raises(ValueError, match="piece"):
        shared(fail_here)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_helpers_work_in_the_callers_mode(mode: Callable[[], Any]) -> None:
    with mode():
        out = torch.zeros(len(SIZES), 2)
        shared(lambda i: torch.mul(torch.ones(2), float(i), out=out[i]))
    assert out[:, 0].tolist() == [float(i) if size else 0.0 for i, size in enumerate(SIZES)]


def test_no_helper_sets_cores_after_the_caller_has_its_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    main, real, order = threading.get_ident(), torch.set_num_threads, []

    def late(count: int) -> None:
        if threading.get_ident() != main:
            time.sleep(0.1)
        real(count)
        order.append((threading.get_ident() == main, count))

    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(torch, "set_num_threads", late)
    for_each(lambda i: None, SIZES)
    time.sleep(0.5)
    assert order[-1] == (True, 2)
    assert len(order) == threads.MOST_THREADS + 1


def test_a_forked_process_has_helpers_of_its_own() -> None:
    shared(lambda i: None)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if len(shared(lambda i: None)) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("form", ["swiglu", "relu_mlp"])
def test_experts_give_the_same_bits_however_their_threads_are_timed(form: str) -> None:
    torch.manual_seed(0)
    experts = Experts(8, 32, 16, form)
    experts.reset_parameters(0.1)
    x = torch.randn(1200, 32, requires_grad=True)
    weights = torch.rand(1200, 2, requires_grad=True)
    chosen = torch.rand(1200, 8).topk(2).indices
    chosen[::7, 1] = -1
    chosen[chosen == 5] = 4

    def gradients() -> list[torch.Tensor]:
        y = experts(x, chosen, weights)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weights, *experts.parameters()])]

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    torch.set_num_threads(1)
    for a, b in zip(first, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1025, 1500, 2048])
@pytest.mark.parametrize("ignored", [0, 7])
def test_the_loss_of_several_threads_has_the_same_bits_every_time_and_is_torchs(tokens: int, ignored: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 16, requires_grad=True)
    head = torch.randn(300, 16, requires_grad=True)
    labels = torch.randint(0, 300, (1, tokens))
    if ignored:
        labels[0, ::ignored] = -100

    def gradients() -> list[torch.Tensor]:
        loss, count = linear_cross_entropy(hidden, head, labels)
        assert count == (labels != -100).sum()
        return [loss, *torch.autograd.grad(3.0 * loss, [hidden, head])]

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    expected = torch.nn.functional.cross_entropy(hidden[0] @ head.t(), labels[0], reduction="sum")
    torch.testing.assert_close(first[0], expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(first[1:], torch.autograd.grad(3.0 * expected, [hidden, head]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, CPU_CHUNK - 1, CPU_CHUNK + 1])
def test_the_loss_of_few_tokens_is_torchs_and_scaled_once(tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, CPU_CHUNK + 2, 16, requires_grad=True)
    head = torch.randn(300, 16, requires_grad=True)
    labels = torch.full((1, CPU_CHUNK + 2), -100)
    labels[0, :tokens] = torch.randint(0, 300, (tokens,))
    loss, _ = linear_cross_entropy(hidden, head, labels)
    gradients = torch.autograd.grad(3.0 * loss, [hidden, head], retain_graph=True)
    expected = torch.nn.functional.cross_entropy(hidden[0] @ head.t(), labels[0], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(3.0 * expected, [hidden, head]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(3.0 * loss, [hidden, head])
