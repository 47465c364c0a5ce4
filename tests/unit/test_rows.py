"""Matrices of which every rank holds rows: each is changed whole, on one rank, and its rows go back."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from jobs.train.rows import changed_whole, held, owners

SHAPES = [(8, 3), (5, 4), (1, 6), (2, 2), (7, 7), (3, 1)]


def test_shares_are_nearly_equal() -> None:
    assert [held(rows, 3) for rows in (9, 7, 4, 1)] == [[3, 3, 3], [3, 3, 1], [2, 2, 0], [1, 0, 0]]
    found = owners([50, 40, 30, 20, 10], 2)
    loads = [sum(size for size, who in zip([50, 40, 30, 20, 10], found, strict=True) if who == rank) for rank in (0, 1)]
    assert sorted(loads) == [70, 80]


def turned(matrix: torch.Tensor) -> torch.Tensor:
    """A change that no rows alone would give: by the matrix's own singular vectors and its first row."""
    return matrix @ matrix.mT @ matrix + matrix[:1]


def one_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    firsts = [sum(held(len(matrix), ranks)[:rank]) for matrix in whole]
    pieces = [m[at : at + held(len(m), ranks)[rank]] for m, at in zip(whole, firsts, strict=True)]
    group = dist.group.WORLD
    assert group is not None
    changed: list[int] = []

    def change(matrix: torch.Tensor) -> torch.Tensor:
        changed.append(matrix.numel())
        return turned(matrix)

    for _ in range(2):
        # One matrix, and ranks without any to change.
        (alone,) = changed_whole(pieces[:1], [len(whole[0])], group, turned)
        assert torch.equal(alone, turned(whole[0])[firsts[0] : firsts[0] + len(alone)])
        found = changed_whole(pieces, [len(matrix) for matrix in whole], group, change)
        for matrix, at, piece in zip(whole, firsts, found, strict=True):
            assert torch.equal(piece, turned(matrix)[at : at + len(piece)])
    total = torch.tensor(sum(changed))
    dist.all_reduce(total)
    assert int(total) == 2 * sum(matrix.numel() for matrix in whole), "each matrix on one rank"
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_its_rows_of_the_whole_that_was_changed(tmp_path: Path, ranks: int) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_rank, args=(rank, ranks, str(tmp_path))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks
