"""States that nobody trains: `finetune.trained: false` measures a model as it comes, beside what is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import GridError
from orchestrator.grid.load import Grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.stage import CellStages
from orchestrator.spec.work import EvaluateWork
from tests.tokenizer_families import FAMILIES, LLAMA

Load = Callable[..., Grid]
ROW = "also: [{trained: [false]}]\n"
GRID = """
factors: {freeze: [none, expert]}
baseline: {freeze: none}
evaluate: [lm, probe]
at: [0.5, 1.0]
set: {finetune.steps: 8, pretrain.steps: 4, %s}
"""


def untrained(grid: Grid, graph: StageGraph) -> CellStages:
    """Return the stages of the row that is only measured."""
    (item,) = [item for item in grid.cells if item.factors.get("trained") is False]
    return graph.cells[item.id]


def test_a_row_that_is_not_trained_measures_the_state_that_the_others_start_from(load: Load) -> None:
    grid = load(GRID % "seed.eval: 1" + ROW)
    graph = build_graph(grid)
    row = untrained(grid, graph)
    (base,) = [stage.key for stage in graph.stages.values() if stage.phase == "pretrain"]
    # One state, which is the last one.
    assert [(result.suite, result.at, result.step) for result in row.results] == [("lm", 1.0, 0), ("probe", 1.0, 0)]
    assert {graph.stages[result.key].state for result in row.results} == {base}
    assert [stage.phase for stage in row.stages if stage.kind == "train"] == ["pretrain"]
    without = build_graph(load(GRID % "seed.eval: 1"))
    assert set(without.stages) < set(graph.stages)


def test_a_public_model_is_measured_without_training_anything(load: Load, tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    rows = [{"prompt": f"{i}?", "response": f"{i}!"} for i in range(40)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    graph = build_graph(
        load(
            "evaluate: [lm]\nat: [1.0]\nset: {pretrain: null, finetune.trained: false, "
            "model.checkpoint: 'file://dense', finetune.data: {source: 'file://examples.jsonl'}}"
        )
    )
    assert not [stage for stage in graph.stages.values() if stage.kind == "train"]
    states = {stage.state for stage in graph.stages.values() if stage.kind == "evaluate"}
    assert [graph.stages[key].kind for key in states] == ["init"]


def test_lists_of_partners_are_not_there_before_fine_tuning(load: Load) -> None:
    grid = load(GRID % "model.moe: {preset: smoe, collaboration_top: 3}" + ROW)
    graph = build_graph(grid)
    for cell in graph.cells.values():
        for stage in cell.stages:
            if isinstance(stage.work, EvaluateWork):
                begun = cell is not untrained(grid, graph)
                assert stage.work.model.moe.collaboration_top == (3 if begun else 0)


@pytest.mark.parametrize("factor", ["freeze: [none, expert]", "lr: [1e-4, 1e-3]", "seed: [0, 1]", "steps: [4, 8]"])
def test_a_factor_of_what_is_not_trained_is_refused(load: Load, factor: str) -> None:
    with pytest.raises(GridError, match=r"finetune\.trained is false"):
        load(GRID % "seed.eval: 1" + ROW.replace("}]", f", {factor}}}]"))
