"""What is submitted first: the same as if every ready stage were looked at, though few are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.engine import agenda
from orchestrator.engine.agenda import Agenda
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec.cell import Resources

GRID = """
name: many
description: many ready stages of three kinds of resources
base: finetune
factors: {freeze: [none, router], seed: [%s]}
baseline: {freeze: none}
evaluate: [lm, reasoning]
set: {execution: {resources: {evaluate: {cores: 1}, finetune: {cores: 2}}}}
"""


@pytest.fixture
def graph(tmp_path: Path) -> StageGraph:
    path = tmp_path / "many.yaml"
    path.write_text(GRID % ", ".join(map(str, range(30))))
    return build_graph(load_grid(str(path)))


class Site:
    """A site of some cores that admits whatever still fits, and counts what it was asked."""

    def __init__(self, cores: int) -> None:
        self.cores, self.asked = cores, 0

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        self.asked += len(wanted)
        free, answers = self.cores, []
        for resources in wanted:
            answers.append(resources.cores <= free)
            free -= resources.cores if answers[-1] else 0
        return answers


def chosen(
    graph: StageGraph, made: Agenda, ready: set[str], done: set[str], site: Site, room: int = 999
) -> list[list[str]]:
    found = made.choose(ready, done, set(), lambda chain: graph.resources(chain[0]), site.admit, room)
    return [chain for chain, _ in found]


@pytest.mark.parametrize("cores", [1, 3, 40, 10_000])
@pytest.mark.parametrize("first", [1, 2, 7])
def test_looking_at_few_chooses_what_looking_at_all_does(
    graph: StageGraph, cores: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = graph.stages.items()
    done = {key for key, stage in stages if stage.phase in ("prepare", "pretrain")}
    trained = [key for key, stage in stages if stage.phase == "finetune"]
    done |= set(trained[::3])
    ready = {key for key, stage in stages if key not in done and set(stage.parents) <= done}
    monkeypatch.setattr(agenda, "FIRST", 10_000)
    everything = chosen(graph, Agenda(graph, Clock()), ready, done, Site(cores))
    monkeypatch.setattr(agenda, "FIRST", first)
    assert chosen(graph, Agenda(graph, Clock()), ready, done, Site(cores)) == everything
    kept = Agenda(graph, Clock())
    for left_out in (5, 60, 1, 0):  # the same agenda as stages come and go
        some = set(sorted(ready)[left_out:])
        assert chosen(graph, kept, some, done, Site(cores)) == chosen(
            graph, Agenda(graph, Clock()), some, done, Site(cores)
        )
    assert chosen(graph, kept, ready, done, Site(cores)) == everything
    assert chosen(graph, kept, ready, done, Site(cores), room=2) == everything[:2]


def test_a_full_site_is_asked_about_few(graph: StageGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "FIRST", 4)
    done = {key for key, stage in graph.stages.items() if stage.phase in ("prepare", "pretrain")}
    ready = {key for key, stage in graph.stages.items() if key not in done and set(stage.parents) <= done}
    site = Site(0)
    assert chosen(graph, Agenda(graph, Clock()), ready, done, site) == []
    assert len(ready) > 40
    assert site.asked <= 8
