"""A plan that is told what changed comes to the plan that is made anew, after any sequence of changes."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.grid.load import load_grid
from orchestrator.plan.following import Following
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan


@cache
def graph_of(name: str) -> StageGraph:
    return build_graph(load_grid(name))


def agrees(
    following: Following, graph: StageGraph, present: set[str], failed: dict[str, str], damaged: set[str]
) -> None:
    """Compare actions, counts and what could start with those of a plan made from nothing."""
    plan = following.update(present, failed, damaged)
    anew = make_plan(graph, present, failed=failed, damaged=damaged)
    assert dict(plan.actions) == dict(anew.actions)
    assert plan.counts() == anew.counts()
    assert plan.settled == anew.settled
    assert following.ready == {
        key
        for key in anew.pending
        if all(parent in present for parent in graph.stages[key].parents) and not anew.guarded(key)
    }


@pytest.mark.parametrize("name", ["quickstart", "finetune_c2r", "safety_freeze"])
@given(data=st.data())
def test_any_changes_lead_to_the_plan_made_anew(name: str, data: st.DataObject) -> None:
    graph = graph_of(name)
    keys = st.sampled_from(list(graph.stages))
    following = Following(graph)
    present, failed, damaged = set[str](), dict[str, str](), set[str]()
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        present ^= data.draw(st.sets(keys, max_size=12), "arrives or is lost")
        for key in data.draw(st.sets(keys, max_size=3), "fails or is pardoned"):
            if failed.pop(key, None) is None:
                failed[key] = data.draw(st.sampled_from(["error: a", "nan: b"]))
        damaged = data.draw(st.sets(keys, max_size=2), "damaged")
        agrees(following, graph, present, failed, damaged)


@pytest.mark.parametrize("name", ["quickstart", "pretrain_router"])
def test_a_run_from_nothing_to_its_end(name: str) -> None:
    graph = graph_of(name)
    following, present = Following(graph), set[str]()
    agrees(following, graph, present, {}, set())
    while following.ready:
        present = {*present, min(following.ready)}
        agrees(following, graph, present, {}, set())
    assert following.counts["done"] == len(graph.stages)
    agrees(following, graph, set(), {}, set())
