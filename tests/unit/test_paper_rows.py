"""The rows of the papers' printed tables, and the settings of ours that they describe."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from orchestrator.grid.load import load_grid
from orchestrator.report.collect import Results, collect
from orchestrator.report.papers import forms, measured
from orchestrator.report.papers.declared import Exhibit, declared
from orchestrator.store import Store
from tests.grid_store import GridStore


@pytest.fixture
def results() -> Results:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    GridStore(store, name="libmoe_vlm").commit_all()
    return collect("libmoe_vlm", store)


def exhibit(paper_name: str, name: str) -> Exhibit:
    return next(e for e in declared().exhibits if (e.paper, e.name) == (paper_name, name))


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_printed_row_is_a_setting_of_its_grid(results: Results, scale: str) -> None:
    for one in declared().exhibits:
        if one.kind != "table" or "temperature" in one.labels:
            continue
        cells = []
        for item in load_grid(one.grid, scale=scale, overrides=tuple(declared().words(one.grid))).cells:
            document = {"resolved": {"model": {"backbone": item.cell.model.backbone}}}
            cells.append(replace(results.cells[0], setting=item.setting, factors=item.factors, document=document))
        shown = replace(results, cells=tuple(cells))
        assert [row for row in one.rows if measured.match(shown, one, row) is None] == [], one.name


def test_models_that_see_stand_beside_the_data_that_they_were_trained_on(results: Results) -> None:
    one = exhibit("LibMoE", "Table 1")
    published = {
        "instruct": {"data": {"source": "hub://lmms-lab/LLaVA-OneVision-Data:*"}},
        "model": {"backbone": "llama"},
    }
    document = {**results.cells[0].document, "resolved": published, "parameters": {"total": 5.67e9}}
    cells = [
        replace(
            results.cells[0],
            setting=preset,
            factors={"preset": preset},
            document=document,
            metrics={"pope/pope/acc": 0.8 + i / 100},
        )
        for i, preset in enumerate(("tc_moe", "moepp"))
    ]
    shown = replace(results, cells=tuple(cells))
    made = forms.table(shown, one)
    assert [(row[0], row[1 + 8]) for row in made.tables[0].rows] == [("TC-MOE", "80.00"), ("MOE++", "81.00")]
    assert any("generated letter" in note for note in made.lacks)
    plain = replace(one, columns=tuple(replace(column, differs="") for column in one.columns))
    row = {name: next(r for r in one.rows if (r["data"], r["method"]) == (name, "MOE++")) for name in one.data}
    column = next(column for column in plain.columns if column.name == "pope")
    assert measured.otherwise(shown, plain, row["onevision_1m2"], column) == ""
    assert "on liuhaotian/LLaVA-Instruct-150K there" in measured.otherwise(shown, plain, row["llava_665k"], column)
