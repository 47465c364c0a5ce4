"""Lays the trees of a schedule behind one another in the rows of single passes, each with what it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jobs.evaluate.prefix_tree import Ints, Schedule, Scored, Tree, Trunk
from jobs.models.packing import Packing, Read

# Branches of up to so many tokens are read whole, with a mask: their parts are too small for products of their own.
BRANCH = 96
# A longer run is read in steps of so many tokens, each of which sees those before it in one product: under a causal
# mask the kernel computes whole blocks.
STEP = 128


@dataclass(frozen=True, slots=True)
class PackedPass:
    """One row of tokens in depth-first order, as in a `Tree`, that goes on from `past` tokens which a cache holds.

    Of a pass with a `trunk` the next one goes on from its first so many tokens.
    """

    ids: Ints
    positions: Ints
    ends: Ints
    scored: Scored
    past: int = 0
    trunk: int = 0

    def filled_up(self, step: int) -> PackedPass:
        """Return this pass with a sequence behind it that nothing reads: its tokens are a whole multiple of `step`."""
        length = len(self.ids)
        if not (more := -length % step):
            return self
        return replace(
            self,
            ids=np.append(self.ids, np.zeros(more, dtype=self.ids.dtype)),
            positions=np.append(self.positions, np.arange(more)),
            ends=np.append(self.ends, np.full(more, length + more)),
        )

    def packing(self, dtype: torch.dtype, device: torch.device, kept: Tensor | None) -> Packing:
        """Return what the tokens read of each other, and of the past."""
        reading = _Reading(self.ends, self.past, dtype, device)
        reading.branches(0, len(self.ids))
        return Packing(tuple(reading.own), tuple(reading.before), dtype, kept)


class _Reading:
    """Collects the reads of a row: `own` in the order of the tokens."""

    def __init__(self, ends: Ints, past: int, dtype: torch.dtype, device: torch.device) -> None:
        self._ends, self._past, self._dtype, self._device = ends, past, dtype, device
        # A run goes on while each token's descendants end where the next one's do.
        self._runs = np.append(np.flatnonzero(ends[1:] != ends[:-1]) + 1, len(ends))
        self.own: list[Read] = []
        self.before = [Read(0, len(ends), 0, past)] if past else []

    def branches(self, low: int, high: int) -> None:
        """Read the branches that lie side by side in [low, high): small ones together."""
        start = low
        while low < high:
            end = int(self._ends[low])
            if end - start > BRANCH and start < low:
                self._masked(start, low)
                start = low
            if end - start > BRANCH:
                self._run(low, end)
                start = end
            low = end
        if start < high:
            self._masked(start, high)

    def _run(self, low: int, high: int) -> None:
        """Read the branch [low, high): its first run, and what goes on from that."""
        stop = int(self._runs[np.searchsorted(self._runs, low, side="right")])
        self._causal(low, stop)
        if stop < high:
            self.before.append(Read(stop, high, low + self._past, stop + self._past))
            self.branches(stop, high)

    def _causal(self, low: int, high: int) -> None:
        for first in range(low, high, STEP):
            last = min(first + STEP, high)
            self.own.append(Read(first, last, first + self._past, last + self._past, causal=True))
            if first > low:
                self.before.append(Read(first, last, low + self._past, first + self._past))

    def _masked(self, low: int, high: int) -> None:
        """Read the branches [low, high) as one: a token sees itself and what it descends from."""
        ends = torch.from_numpy(self._ends[low:high] - low).to(self._device)
        if bool((ends == high - low).all()):
            self._causal(low, high)
            return
        place = torch.arange(high - low, device=self._device)
        seen = (place[None, :] <= place[:, None]) & (place[:, None] < ends[None, :])
        bias = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        bias.masked_fill_(~seen, torch.finfo(self._dtype).min)
        self.own.append(Read(low, high, low + self._past, high + self._past, mask=bias))


def passes(schedule: Schedule, tokens: int) -> Iterator[PackedPass]:
    """Yield the passes of a schedule, of about so many tokens each; those of one large trunk follow one another."""
    waiting: list[Tree] = []
    size = 0
    for tree in _small(schedule, tokens):
        if waiting and size + len(tree.ids) > tokens:
            yield PackedPass(*_joined(waiting))
            waiting, size = [], 0
        waiting.append(tree)
        size += len(tree.ids)
    if waiting:
        yield PackedPass(*_joined(waiting))
    for trunk in (trunk for batch in schedule.trunks for trunk in batch if _size(trunk) > tokens):
        yield from _of_trunk(trunk, tokens)


def _small(schedule: Schedule, tokens: int) -> Iterator[Tree]:
    """Yield the trees, and the trunks that fit one pass with all that goes on from them."""
    for trees in schedule.trees:
        yield from trees
    for trunks in schedule.trunks:
        for trunk in trunks:
            if _size(trunk) <= tokens:
                yield _grown(trunk, trunk.trees)


def _size(trunk: Trunk) -> int:
    return len(trunk.ids) + sum(len(tree.ids) for tree in trunk.trees)


def _of_trunk(trunk: Trunk, tokens: int) -> Iterator[PackedPass]:
    """Yield a trunk with its first trees, then the others in passes that go on from it."""
    length = len(trunk.ids)
    parts: list[list[Tree]] = [[]]
    size = length
    for tree in trunk.trees:
        if size + len(tree.ids) > tokens and (parts[-1] or length == size):
            parts.append([])
            size = 0
        parts[-1].append(tree)
        size += len(tree.ids)
    more = length if len(parts) > 1 else 0
    whole = _grown(trunk, parts[0])
    yield PackedPass(whole.ids, whole.positions, whole.ends, whole.scored, trunk=more)
    for part in parts[1:]:
        yield PackedPass(*_joined(part), past=length, trunk=0 if part is parts[-1] else length)


def _grown(trunk: Trunk, trees: Sequence[Tree]) -> Tree:
    """Return a trunk and trees below it as one tree."""
    length = len(trunk.ids)
    stem = Tree(trunk.ids, np.arange(length), np.full(length, length), trunk.scored, chain=True)
    ids, positions, ends, scored = _joined([stem, *trees])
    ends[:length] = len(ids)
    return Tree(ids, positions, ends, scored, chain=not trees)


def _joined(trees: Sequence[Tree]) -> tuple[Ints, Ints, Ints, Scored]:
    """Return trees side by side: ids, positions, where descendants end, and what is scored."""
    starts = np.cumsum([0, *(len(tree.ids) for tree in trees)])[:-1]
    placed = list(zip(trees, starts, strict=True))
    scored = Scored(
        np.concatenate([tree.scored.position + start for tree, start in placed]),
        np.concatenate([tree.scored.target for tree in trees]),
        np.concatenate([tree.scored.request for tree in trees]),
    )
    return (
        np.concatenate([tree.ids for tree in trees]),
        np.concatenate([tree.positions for tree in trees]),
        np.concatenate([tree.ends + start for tree, start in placed]),
        scored,
    )
