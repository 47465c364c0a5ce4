"""A state's key says which steps ran under which conditions, not where the run was cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec.identity import Span, lineage, state_key, state_keys

# A run, step by step: the conditions of each.
Run = list[str]
runs = st.lists(st.sampled_from("abc"), max_size=12)


@st.composite
def cut_runs(draw: st.DrawFn) -> tuple[Run, list[Span]]:
    """A run, and its spans cut at will, empty ones among them."""
    run = draw(runs)
    edges = {0, len(run), *(i for i in range(1, len(run)) if run[i] != run[i - 1])}
    edges |= draw(st.sets(st.integers(0, len(run))))
    bounds = sorted([*edges, *draw(st.lists(st.sampled_from(sorted(edges)), max_size=3))])
    spans = [(run[min(a, len(run) - 1)] if run else "a", a, b) for a, b in itertools.pairwise(bounds)]
    return run, spans


@given(cut_runs())
def test_a_lineage_is_the_run_itself_wherever_it_was_cut(case: tuple[Run, list[Span]]) -> None:
    run, spans = case
    merged = lineage(spans)
    assert [conditions for conditions, start, stop in merged for _ in range(start, stop)] == run
    assert all(a[0] != b[0] for a, b in itertools.pairwise(merged)), "equal neighbours are one span"
    assert lineage(merged) == merged


@given(cut_runs(), cut_runs())
def test_two_states_have_one_key_exactly_when_their_runs_are_equal(
    first: tuple[Run, list[Span]], second: tuple[Run, list[Span]]
) -> None:
    same = state_key("init", first[1]) == state_key("init", second[1])
    assert same == (first[0] == second[0])


@given(cut_runs(), st.integers(1, 5))
def test_the_keys_of_many_steps_are_those_of_each_step(case: tuple[Run, list[Span]], more: int) -> None:
    run, spans = case
    start = len(run)
    steps = list(range(start + 1, start + more + 1))
    new = "d"  # conditions of their own: a span that goes on would have begun earlier
    assert state_keys("init", spans, new, start, steps) == [
        state_key("init", [*spans, (new, start, step)]) for step in steps
    ]
