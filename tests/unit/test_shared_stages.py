"""What several grids share in one store: whoever makes it, it has the same bits."""

from __future__ import annotations

from collections import defaultdict

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.resources import ROOT


def test_grids_that_share_a_stage_give_it_as_many_threads_and_processes() -> None:
    """Threads and ranks are no part of a key, and decide the last digits of what is made of a shared state."""
    asked: dict[str, set[tuple[int, int, int]]] = defaultdict(set)
    users: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "grids").glob("*.yaml")):
        graph = build_graph(load_grid(path.stem))
        for key, stage in graph.stages.items():
            resources = graph.resources(key)
            asked[key].add((resources.nodes, resources.processes, resources.cores))
            users[key].append(f"{path.stem}: {stage.label}")
    assert max(map(len, users.values())) > 2
    assert [users[key] for key, ways in asked.items() if len(ways) > 1] == []
