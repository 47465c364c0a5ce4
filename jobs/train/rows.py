"""Whole matrices of which ranks hold runs of rows: brought together, each on one rank, changed there, and cut again.

Each rank of a group changes its share of the matrices, so that none computes or keeps all of them: two exchanges, of as
many bytes as its rows have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.errors import MoegridError


def held(rows: int, ranks: int) -> list[int]:
    """Return how many of a matrix's rows each rank holds: torch.chunk's, the last ranks fewer or none."""
    each = -(-rows // ranks)
    return [max(0, min(each, rows - rank * each)) for rank in range(ranks)]


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return which rank changes each matrix, by their numbers of elements: shares that are nearly equal."""
    loads, found = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        found[place] = loads.index(min(loads))
        loads[found[place]] += sizes[place]
    return found


def changed_whole(
    pieces: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup, change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return this rank's rows of `change(matrix)` of each matrix, of which it holds `pieces` [r,C] of `rows` rows.

    `change` keeps a matrix's shape and type; all have one type. Collective: every rank of the group calls it with the
    same matrices in the same order. Raises MoegridError where a piece has not the rows that its rank should hold.
    """
    ranks, own = dist.get_world_size(group), dist.get_rank(group)
    split = [held(count, ranks) for count in rows]
    for piece, counts in zip(pieces, split, strict=True):
        if len(piece) != counts[own]:
            raise MoegridError(
                f"rank {own} of {ranks} holds {len(piece)} of a matrix's {sum(counts)} rows",
                cause=f"a parameter that is cut in runs of equal length leaves it {counts[own]}",
                hint="report this engine; optimizer: adamw is not affected",
            )
    columns = [piece.shape[1] for piece in pieces]
    owner = owners([count * width for count, width in zip(rows, columns, strict=True)], ranks)
    mine = [place for place, who in enumerate(owner) if who == own]
    order = sorted(range(len(pieces)), key=lambda place: (owner[place], place))
    sent = [sum(pieces[place].numel() for place in order if owner[place] == rank) for rank in range(ranks)]
    shapes = [[(split[place][rank], columns[place]) for place in mine] for rank in range(ranks)]
    received = [sum(map(math.prod, of_rank)) for of_rank in shapes]
    arrived = _exchanged([pieces[place] for place in order], sent, received, group, pieces[0])
    runs = _cut(arrived, list(itertools.chain(*shapes)))  # by rank, then by matrix
    whole = [change(torch.cat(runs[place :: len(mine)])) for place in range(len(mine))]
    parts = [[split[place][rank] for rank in range(ranks)] for place in mine]
    cut = [matrix.split(counts) for matrix, counts in zip(whole, parts, strict=True)]
    back = _exchanged([parts[rank] for rank in range(ranks) for parts in cut], received, sent, group, pieces[0])
    returned = dict(zip(order, _cut(back, [tuple(pieces[place].shape) for place in order]), strict=True))
    return [returned[place] for place in range(len(pieces))]


def _exchanged(
    parts: Sequence[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup, like: Tensor
) -> Tensor:
    """Send runs of elements, of the type of `like`, to each rank; return what came from each, one after the other."""
    leaving = torch.cat([like.new_empty(0), *(part.reshape(-1) for part in parts)])
    arriving = leaving.new_empty(sum(received))
    dist.all_to_all_single(arriving, leaving, received, sent, group=group)
    return arriving


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    runs = flat.split([math.prod(shape) for shape in shapes])
    return [run.view(shape) for run, shape in zip(runs, shapes, strict=True)]
