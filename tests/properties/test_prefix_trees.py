"""A schedule of shared prefixes computes what each request alone would: every target, after exactly its own tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluate import prefix_tree
from jobs.evaluate.prefix_tree import Ints, Schedule, Scored, Tree, cut, plan

Request = tuple[Ints, Ints]
Seen = Counter[tuple[int, tuple[int, ...], int]]  # (request, tokens fed before, target)


@st.composite
def request_sets(draw: st.DrawFn) -> list[Request]:
    """Requests over few tokens, most of them beginning with one of a few prefixes of any length."""
    token = st.integers(0, 2)
    prefixes = draw(st.lists(st.lists(token, max_size=40), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 12))):
        context = [*draw(st.sampled_from(prefixes)), *draw(st.lists(token, min_size=1, max_size=4))]
        found.append(cut(context, draw(st.lists(token, min_size=1, max_size=4)), 24))
    return found


def alone(requests: list[Request]) -> Seen:
    """What must be scored: each request's targets, each after all that is fed before it."""
    seen: Seen = Counter()
    for number, (fed, targets) in enumerate(requests):
        first = len(fed) - len(targets)
        for i, target in enumerate(targets):
            seen[number, tuple(fed[: first + i + 1].tolist()), int(target)] += 1
    return seen


def scored(part: Scored, contexts: list[tuple[int, ...]]) -> Seen:
    rows = zip(part.position.tolist(), part.target.tolist(), part.request.tolist(), strict=True)
    return Counter((request, contexts[position], target) for position, target, request in rows)


def contexts_of(tree: Tree, trunk: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return what each token of a tree attends to, itself included: the trunk and the tokens that it descends from."""
    found = []
    for here, position in enumerate(tree.positions.tolist()):
        above = [int(tree.ids[i]) for i in range(here + 1) if here < tree.ends[i]]
        found.append((*trunk, *above))
        assert len(found[-1]) == position + 1, "a token's position is its place in its own sequence"
    return found


def computed(schedule: Schedule) -> Seen:
    seen: Seen = Counter()
    for batch in schedule.trees:
        for tree in batch:
            assert tree.chain == bool((tree.ends == len(tree.ids)).all())
            seen += scored(tree.scored, contexts_of(tree, ()))
    for trunks in schedule.trunks:
        for trunk in trunks:
            ids = tuple(trunk.ids.tolist())
            seen += scored(trunk.scored, [ids[: i + 1] for i in range(len(ids))])
            for tree in trunk.trees:
                seen += scored(tree.scored, contexts_of(tree, ids))
    return seen


@pytest.mark.parametrize("share", [True, False])
@given(requests=request_sets(), tokens=st.integers(1, 300), rows=st.integers(0, 3), flat=st.sampled_from((1, 160)))
def test_every_target_is_scored_once_after_exactly_its_own_tokens(
    share: bool, requests: list[Request], tokens: int, rows: int, flat: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "FLAT_TOKENS", flat)  # 1: trunks also for few tokens
        patch.setattr(prefix_tree, "CHUNK_TOKENS", 8 * flat)
        schedule = plan(requests, share=share, tokens_per_batch=tokens, rows=rows)
    assert computed(schedule) == alone(requests)
    assert schedule.requests == len(requests)
    assert schedule.tokens <= sum(len(fed) for fed, _ in requests), "sharing never costs tokens"
    if rows:
        assert all(len(batch) <= rows for batch in schedule.trees)


@given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8), st.integers(1, 8))
def test_a_window_keeps_the_whole_continuation_and_the_nearest_context(
    context: list[int], continuation: list[int], window: int
) -> None:
    if not context or not 0 < len(continuation) <= window:
        with pytest.raises(ValueError, match="cannot score"):
            cut(context, continuation, window)
        return
    fed, targets = cut(context, continuation, window)
    assert targets.tolist() == continuation
    assert fed.tolist() == [*context, *continuation][:-1][-window:]
    assert fed.dtype == targets.dtype == np.int64
