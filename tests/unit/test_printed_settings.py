"""The grids' settings at the scale of the published size, against what the papers print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import read_mapping
from orchestrator.grid.files import grid_names
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.cost import parameters
from orchestrator.report.papers.declared import FOLDER
from orchestrator.spec.cell import Cell

Entry = Mapping[str, Any]
TABLE = read_mapping(FOLDER / "settings.yaml", "settings.yaml", Problems()).data
ENTRIES = [
    pytest.param(grid, entry, id=f"{grid}, {entry['printed_in']}")
    for grid, entries in TABLE["grids"].items()
    for entry in entries
]


def test_every_shipped_grid_is_in_the_table_once() -> None:
    assert sorted((*TABLE["grids"], *TABLE["own"])) == sorted(grid_names())


@pytest.mark.parametrize("name, entry", ENTRIES)
def test_a_grid_has_the_printed_settings(name: str, entry: Entry, grids: Callable[[str, str], Grid]) -> None:
    grid = grids(name, entry["scale"])
    chosen = [
        item for item in grid.cells if all(item.factors.get(k) == value for k, value in entry.get("where", {}).items())
    ]
    assert chosen
    for item in chosen:
        for path, printed in entry.get("values", {}).items():
            ours = _value(item.cell, path)
            if path in ("count.total", "count.active", "count.tokens"):
                assert ours == pytest.approx(printed, rel=0.015), path
            else:
                assert ours == printed, path
        if "tasks" in entry:
            assert {task.name: [task.shots, task.metric] for task in item.cell.evaluate.tasks} == entry["tasks"]
            assert not any(task.limit for task in item.cell.evaluate.tasks)
    for factor, values in entry.get("factors", {}).items():
        ours = {item.factors[factor] for item in grid.cells if factor in item.factors}
        assert ours >= set(values), factor


@pytest.fixture(scope="module")
def grids() -> Callable[[str, str], Grid]:
    known: dict[tuple[str, str], Grid] = {}

    def load(name: str, scale: str) -> Grid:
        if (name, scale) not in known:
            known[name, scale] = load_grid(name, scale=scale)
        return known[name, scale]

    return load


def _value(cell: Cell, path: str) -> object:
    """Return a field of a cell, or what is reckoned from several."""
    if not path.startswith("count."):
        found: Any = cell
        for part in path.split("."):
            found = getattr(found, part)
        return found
    train = cell.finetune or cell.pretrain
    assert train is not None
    vocabulary = cell.model.vocab_size or cell.tokenizer.vocab_size
    count = parameters(cell.model, vocabulary)
    sequences = train.steps * train.micro_batch * train.accumulation
    reckoned: Mapping[str, Callable[[], object]] = {
        "total": lambda: count.total / 1e6,
        # Of the input embeddings a token reads one row, the papers count all.
        "active": lambda: (count.active + vocabulary * cell.model.hidden_size) / 1e6,
        "tokens": lambda: sequences * train.sequence_length / 1e9,
        "batch": lambda: train.micro_batch * train.accumulation,
        "warmup": lambda: round(train.warmup_ratio * train.steps),
        "epochs": lambda: round(sequences / train.data.examples),
    }
    return reckoned[path.removeprefix("count.")]()
