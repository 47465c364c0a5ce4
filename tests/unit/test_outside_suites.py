"""A suite of another package: one declaration, and grids, plans, keys, columns and nodes know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.run import ranked, stage_function
from orchestrator.catalog.suites import SUITES, SuiteKind
from orchestrator.errors import MoegridError
from orchestrator.grid.columns import columns_of
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec.work import EvaluateWork, work_from_json, work_to_json
from tests.packages import found, install
from tests.unit.conftest import Load, Told

MODULE = """
from dataclasses import dataclass

from orchestrator.catalog.suites import SuiteKind

SEEN = []


@dataclass(frozen=True)
class Depth:
    layers: int = 2


def depth(context, work, parameters):
    SEEN.append((context, work.suite, parameters.layers))


DEPTH = SuiteKind("depth", "outside_suites:depth", reads=("text", "tasks"), settings=("seed", "limit"),
                  columns=("depth",), task_columns=("depth",), parameters=Depth, ranked=True)
LAST = SuiteKind("last", "outside_suites:depth", reads=(), settings=(), columns=("late",), final=True, needs_tasks=True)
GONE = SuiteKind("gone", "outside_suites:nowhere", reads=())
"""
ENTRIES = {"suites": {"depth": "outside_suites:DEPTH", "last": "outside_suites:LAST", "gone": "outside_suites:GONE"}}
MEASURED = "factors: {seed: [0]}\nevaluate: [lm, depth]\nat: [0.5, 1.0]\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path) -> Iterator[None]:
    install(tmp_path / "site", "outside_suites", MODULE, ENTRIES)
    with found(tmp_path / "site", "outside_suites"):
        yield


def works(graph: StageGraph, suite: str) -> list[EvaluateWork]:
    found = [stage.work for stage in graph.stages.values()]
    return [work for work in found if isinstance(work, EvaluateWork) and work.suite == suite]


def test_a_grid_measures_with_it_what_it_says_it_reads(load: Load) -> None:
    grid = load(MEASURED + "primary: [depth, arc_easy/depth]\nset: {evaluate.suite_parameters: {depth: {layers: 3}}}\n")
    early, late = works(build_graph(grid), "depth")
    assert early.state != late.state
    assert early.tokens
    assert early.items
    assert early.tasks
    assert (early.shots, early.limit > 0, early.routing_seeds) == ("per_item", True, 0)
    assert dict(early.parameters) == {"layers": 3}
    assert work_from_json(work_to_json(early)).key() == early.key()
    assert {"val_loss", "depth", "arc_easy/depth"} <= columns_of(grid.cells[0].cell)


def test_its_version_and_parameters_are_in_its_keys_and_in_no_others(load: Load) -> None:
    def keys(text: str = "") -> dict[str, str]:
        graph = build_graph(load(MEASURED + text))
        return {stage.key: stage.suite or stage.kind for stage in graph.stages.values()}

    plain = keys()
    assert keys("set: {evaluate.suite_parameters: {depth: {layers: 2}}}\n") == plain
    told = keys("set: {evaluate.suite_parameters: {depth: {layers: 5}}}\n")
    assert {plain[key] for key in set(plain) - set(told)} == {"depth"}
    object.__setattr__(SUITES.outside["depth"].declaration, "version", 2)
    again = keys()
    assert {plain[key] for key in set(plain) - set(again)} == {"depth"}


def test_the_last_state_alone_where_it_says_so(load: Load) -> None:
    grid = load(MEASURED.replace("depth", "last"))
    (work,) = works(build_graph(grid), "last")
    assert (work.tokens, work.items, work.tasks) == ("", "", ())
    assert "late" not in columns_of(grid.cells[0].cell, 0.5)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("evaluate: [dept]", "must be one of", "did you mean 'depth'?"),
        ("evaluate: [last]\nset: {evaluate.tasks: []}", "and last need evaluate.tasks", "name at least one"),
        ("evaluate: [depth]\nset: {evaluate.suite_parameters: {depth: {layer: 1}}}", "layer is no parameter", "layers"),
        ("evaluate: [lm]\nset: {evaluate.suite_parameters: {depth: {layers: 1}}}", "is not evaluated", "evaluate it"),
        ("evaluate: [lm]\nset: {evaluate.suite_parameters: {lm: {layers: 1}}}", "is moegrid's own", "fields of"),
        ("evaluate: [lm]\nprimary: [depth]", "primary names 'depth'", ""),
    ],
)
def test_what_is_wrong_is_told(told: Told, text: str, message: str, hint: str) -> None:
    problem = told(f"factors: {{seed: [0]}}\n{text}\n")
    assert message in problem.message
    assert hint in problem.hint


def test_a_node_runs_its_code_with_its_parameters(load: Load) -> None:
    work = works(build_graph(load(MEASURED + "set: {evaluate.suite_parameters: {depth: {layers: 7}}}\n")), "depth")[0]
    assert ranked(work)
    stage_function(work)("context", work)
    import outside_suites  # type: ignore[import-not-found]

    assert outside_suites.SEEN == [("context", "depth", 7)]
    (gone,) = works(build_graph(load("factors: {seed: [0]}\nevaluate: [gone]\nat: [1.0]\n")), "gone")
    with pytest.raises(
        MoegridError, match=r"the code of suite 'gone' of outside_suites 1.2 cannot be imported: outside_suites:nowhere"
    ):
        stage_function(gone)


def test_benchmarks_are_of_our_suites_and_code_is_needed() -> None:
    with pytest.raises(ValueError, match="needs code, and no benchmarks"):
        SuiteKind("mine", "a:b", reads=("benchmarks",))
    with pytest.raises(ValueError, match="needs code, and no benchmarks"):
        SuiteKind("mine")
    with pytest.raises(ValueError, match="reads some of text, tasks, benchmarks"):
        SuiteKind("mine", "a:b", reads=("texts",))
