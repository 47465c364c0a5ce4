"""Which tokens have to be computed to score a set of requests, when shared prefixes are computed once.

Requests are sorted, so that neighbours share prefixes. A long prefix with several continuations becomes a *trunk*: one
causal pass with a KV cache. What hangs below it is laid out in depth-first order as a *tree*: one pass in which a token
attends to the trunk and to its own ancestors. Short groups are one tree without a trunk; lone requests are chains.
A schedule knows token ids only, so that several models or interventions can share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]

# A shared prefix shorter than this is cheaper to compute again than to cache.
SHORTEST_TRUNK = 16
# Groups up to this many tokens are one pass with a mask; above it, the causal pass over the trunk is cheaper.
FLAT_TOKENS = 160
# A tree is cut at its top branches into pieces of about so many tokens: attention inside it is quadratic.
CHUNK_TOKENS = 512
# Sharing must save this many tokens of a group.
LEAST_GAIN = 6
# A row shorter than this share of its batch's longest starts a new batch.
MOST_RAGGED = 0.9


@dataclass(frozen=True, slots=True)
class Scored:
    """Positions whose next-token distribution is needed: `position` in the row, the `target` id, the request."""

    position: Ints
    target: Ints
    request: Ints

    @classmethod
    def of(cls, triples: list[tuple[Ints, Ints, int]]) -> Scored:
        if not triples:
            return cls(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        requests = [np.full(len(positions), request, dtype=np.int64) for positions, _, request in triples]
        return cls(
            np.concatenate([positions for positions, _, _ in triples]),
            np.concatenate([targets for _, targets, _ in triples]),
            np.concatenate(requests),
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens in depth-first order, [Q] each: ids, positions in their sequence, and where the token's descendants end.

    A token is attended to by itself and the later tokens before its `end`. In a chain every `end` is Q.
    """

    ids: Ints
    positions: Ints
    ends: Ints
    scored: Scored
    chain: bool


@dataclass(frozen=True, slots=True)
class Trunk:
    """A prefix computed once, with the pieces of the tree below it."""

    ids: Ints
    scored: Scored
    trees: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Batches of rows: lone trees (chains apart from branching ones), and trunks; and how many requests they serve."""

    trees: tuple[tuple[Tree, ...], ...]
    trunks: tuple[tuple[Trunk, ...], ...]
    requests: int

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed, without padding."""
        rows = [tree for batch in self.trees for tree in batch]
        trunks = [trunk for batch in self.trunks for trunk in batch]
        below = sum(len(tree.ids) for trunk in trunks for tree in trunk.trees)
        return sum(len(tree.ids) for tree in rows) + sum(len(trunk.ids) for trunk in trunks) + below


@dataclass(slots=True)
class _Sorted:
    """Requests in lexicographic order of the tokens fed, with the prefix that each shares with the one before."""

    fed: list[Ints]  # tokens that are fed
    targets: list[Ints]  # the continuation: what the last positions must predict
    request: list[int]
    common: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    new: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # running sum of tokens not shared

    def size(self, low: int, high: int, base: int) -> int:
        """Number of distinct tokens of requests [low, high) below depth `base`, which they all share."""
        return int(len(self.fed[low]) - base + self.new[high] - self.new[low + 1])


def cut(context: ArrayLike, continuation: ArrayLike, max_length: int) -> tuple[Ints, Ints]:
    """Return (tokens to feed, tokens to predict), cut on the left to `max_length` fed tokens.

    Raises ValueError for an empty context or a continuation that is empty or longer than `max_length`.
    """
    before, after = np.asarray(context, dtype=np.int64), np.asarray(continuation, dtype=np.int64)
    if not len(before) or not 0 < len(after) <= max_length:
        raise ValueError(f"cannot score {len(after)} tokens after {len(before)} in a window of {max_length}")
    whole = np.concatenate([before, after])[-(max_length + 1) :]
    return whole[:-1], whole[len(whole) - len(after) :]


def _sort(requests: Sequence[tuple[Ints, Ints]]) -> _Sorted:
    keys = [fed.astype(">i4").tobytes() for fed, _ in requests]
    order = sorted(range(len(requests)), key=keys.__getitem__)
    table = _Sorted([requests[i][0] for i in order], [requests[i][1] for i in order], order)
    common = np.zeros(len(order) + 1, dtype=np.int64)
    for i in range(1, len(order)):
        before, here = table.fed[i - 1], table.fed[i]
        length = min(len(before), len(here))
        differs = np.flatnonzero(before[:length] != here[:length])
        common[i] = differs[0] if len(differs) else length
    lengths = np.array([len(fed) for fed in table.fed], dtype=np.int64)
    table.common = common
    table.new = np.concatenate([[0], np.cumsum(lengths - common[:-1])])
    return table


def _layout(table: _Sorted, low: int, high: int, base: int) -> tuple[Tree, list[tuple[Ints, Ints, int]]]:
    """Lay out requests [low, high) below depth `base`; also return what must be scored inside the trunk."""
    total = table.size(low, high, base)
    ids, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    ends = np.full(total, total, dtype=np.int64)
    longest = max(len(table.fed[i]) for i in range(low, high))
    path = np.empty(longest - base, dtype=np.int64)  # row index of the open token at each depth below base
    filled, open_depth = 0, base
    inside: list[tuple[Ints, Ints, int]] = []
    above: list[tuple[Ints, Ints, int]] = []
    for i in range(low, high):
        fed, targets = table.fed[i], table.targets[i]
        shared = base if i == low else int(table.common[i])
        ends[path[shared - base : open_depth - base]] = filled
        count = len(fed) - shared
        ids[filled : filled + count] = fed[shared:]
        positions[filled : filled + count] = np.arange(shared, len(fed))
        path[shared - base : len(fed) - base] = np.arange(filled, filled + count)
        filled, open_depth = filled + count, len(fed)
        depths = np.arange(len(fed) - len(targets), len(fed))
        split = int(np.clip(base - depths[0], 0, len(depths)))
        if split < len(depths):
            inside.append((path[depths[split:] - base], targets[split:], table.request[i]))
        if split:
            above.append((depths[:split], targets[:split], table.request[i]))
    chain = bool((ends == total).all())
    return Tree(ids, positions, ends, Scored.of(inside), chain), above


class _Planner:
    def __init__(self, table: _Sorted) -> None:
        self.table = table
        self.trees: list[Tree] = []
        self.trunks: list[Trunk] = []

    def visit(self, low: int, high: int) -> None:
        """Plan the requests [low, high)."""
        table = self.table
        pending = [(low, high)]
        while pending:
            low, high = pending.pop()
            if high - low == 1:
                self._flat(low, high)
                continue
            depth = int(table.common[low + 1 : high].min())
            branches = self._branches(low, high, depth)
            if len(branches) == 1 or (table.size(low, high, 0) <= FLAT_TOKENS and self._gain(low, high) >= LEAST_GAIN):
                self._flat(low, high)
            elif depth < SHORTEST_TRUNK:
                pending.extend(branches)
            else:
                pending.extend(self._trunk(branches, depth))

    def _gain(self, low: int, high: int) -> int:
        """Tokens that sharing saves, against computing each distinct sequence whole."""
        table = self.table
        distinct = [i for i in range(low, high) if i == low or len(table.fed[i]) > table.common[i]]
        return sum(len(table.fed[i]) for i in distinct) - table.size(low, high, 0)

    def _branches(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """Cut [low, high) where the shared prefix is only `depth` long; requests that end there come first, as one."""
        places = low + 1 + np.flatnonzero(self.table.common[low + 1 : high] == depth)
        ending = sum(1 for i in range(low, high) if len(self.table.fed[i]) == depth)
        cuts = [int(place) for place in places if place >= low + max(ending, 1)]
        return list(pairwise([low, *cuts, high]))

    def _flat(self, low: int, high: int) -> None:
        tree, _ = _layout(self.table, low, high, 0)
        self.trees.append(tree)

    def _trunk(self, branches: list[tuple[int, int]], depth: int) -> list[tuple[int, int]]:
        """Plan a trunk of `depth` tokens with the branches that fit a chunk; return those that need their own."""
        table = self.table
        chunks: list[tuple[int, int]] = []
        large: list[tuple[int, int]] = []
        for low, high in branches:
            size = table.size(low, high, depth)
            if high - low > 1 and size > max(2 * CHUNK_TOKENS, 2 * depth):
                large.append((low, high))
            elif chunks and chunks[-1][1] == low and table.size(chunks[-1][0], high, depth) <= CHUNK_TOKENS:
                chunks[-1] = (chunks[-1][0], high)
            else:
                chunks.append((low, high))
        if sum(high - low for low, high in chunks) < 2:
            return [*large, *chunks]
        trees: list[Tree] = []
        above: list[tuple[Ints, Ints, int]] = []
        for low, high in chunks:
            tree, trunk_scored = _layout(table, low, high, depth)
            above += trunk_scored
            if len(tree.ids):
                trees.append(tree)
        self.trunks.append(Trunk(table.fed[chunks[0][0]][:depth], Scored.of(above), tuple(trees)))
        return large


def _packed(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Yield groups of row numbers, in order: padded to at most `tokens`, and with little padding once large enough."""
    group: list[int] = []
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        ragged = length < MOST_RAGGED * longest and longest * len(group) >= tokens // 8
        if group and (ragged or longest * (len(group) + 1) > tokens):
            yield group
            group, longest = [], length
        group.append(row)
    if group:
        yield group


def _likeness(trunk: Trunk) -> tuple[int, int, int]:
    """Sort key: rows of a batch should agree in number of trees, in trunk length (to 5 %), then in tree length."""
    step = -round(math.log(max(len(trunk.ids), 1)) / math.log(1.05))
    return len(trunk.trees), step, -max((len(tree.ids) for tree in trunk.trees), default=0)


def plan(
    requests: Sequence[tuple[Ints, Ints]],
    *,
    share: bool = True,
    tokens_per_batch: int = 2048,
    rows: int = 0,
) -> Schedule:
    """Return the schedule for requests of (tokens to feed, tokens to predict), as `cut` makes them.

    `share=False` computes every request on its own (for models that cannot share a cache); `rows` limits the rows
    of a batch, 0 = only by tokens.
    """
    if not requests:
        return Schedule((), (), 0)
    table = _sort(requests)
    planner = _Planner(table)
    if share:
        planner.visit(0, len(requests))
    else:
        for i in range(len(requests)):
            planner.visit(i, i + 1)
    # Equal lengths side by side keep padding small; the longest first shows at once whether memory suffices.
    trees = sorted(planner.trees, key=lambda tree: (tree.chain, -len(tree.ids)))
    trunks = sorted(planner.trunks, key=_likeness)
    tree_batches: list[tuple[Tree, ...]] = []
    for chain in (False, True):
        same = [tree for tree in trees if tree.chain is chain]
        for group in _packed([len(tree.ids) for tree in same], tokens_per_batch):
            step = rows or len(group)
            tree_batches += [tuple(same[i] for i in group[at : at + step]) for at in range(0, len(group), step)]
    trunk_batches = []
    for count in sorted({len(trunk.trees) for trunk in trunks}):
        same_count = [trunk for trunk in trunks if len(trunk.trees) == count]
        lengths = [max(len(t.ids), max((len(tree.ids) for tree in t.trees), default=0)) for t in same_count]
        trunk_batches += [tuple(same_count[i] for i in group) for group in _packed(lengths, tokens_per_batch)]
    return Schedule(tuple(tree_batches), tuple(trunk_batches), len(requests))
