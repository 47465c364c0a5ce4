"""The rows of the papers' printed tables, and the settings of ours that they describe."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.grid.columns import columns_of
from orchestrator.grid.load import load_grid
from orchestrator.report.collect import Results, collect
from orchestrator.report.papers import forms, measured
from orchestrator.report.papers.choice import chosen, split
from orchestrator.report.papers.declared import Exhibit, declared
from orchestrator.store import Store
from tests import benchmark_samples as samples
from tests.grid_store import GridStore

SAMPLES: Mapping[str, Callable[[Path], Path]] = {
    "snli": samples.snli,
    "snli_hard": samples.snli_hard,
    "sst2_styles": samples.sst2_styles,
    "truthfulqa": samples.truthfulqa,
}


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


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_a_figure_has_one_setting_for_each_of_its_bars_and_lines(results: Results, scale: str) -> None:
    """Settings with another mitigation would be drawn under the same name."""
    for one in declared().exhibits:
        if one.kind not in ("bars", "radar", "shift", "stacked") or one.vision or one.words:
            continue
        grid = load_grid(one.grid, overrides=tuple(declared().words(one.grid)), scale=scale)
        cells = tuple(replace(results.cells[0], setting=item.setting, factors=item.factors) for item in grid.cells)
        shown = replace(results, cells=cells)
        factor = one.x or (next(iter(one.lines)) if isinstance(one.lines, Mapping) else "")
        for panel, members in split(shown, one, chosen(shown, one, (factor,)), factor).items():
            values = [setting.factors.get(factor) for setting in members]
            assert len(values) == len(set(values)) > 0, f"{one.paper} {one.name} {panel}"


def test_the_command_of_what_needs_a_users_data_measures_it(tmp_path: Path) -> None:
    """Made-up files in the published layouts stand for the user's: a plan of the command has the exhibit's columns."""
    judge, folder = tmp_path / "judge", tmp_path / "files"
    folder.mkdir()
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([{"instruction": "How ?", "output": f"No, {i}."} for i in range(600)]))
    files = {
        "set.evaluate.safety.source": samples.safety(tmp_path / "safety"),
        "set.evaluate.judges.llama_guard.source": judge,
        "set.finetune.data.mix.source": mixed,
        **{f"set.evaluate.{name}.source": made(folder) for name, made in SAMPLES.items()},
    }
    needing = [one for one in declared().exhibits if one.needs and not one.vision]
    assert len(needing) == 8
    for one in needing:
        words = []
        for word in declared().command(one).split()[3:]:
            key, _, value = word.partition("=")
            words.append(f"{key}=file://{files[key]}" if value in ("FOLDER", "FILE") else word)
        grid = load_grid(one.grid, overrides=tuple(words), scale="tiny")
        columns = frozenset[str]().union(*(columns_of(item.cell) for item in grid.cells))
        wanted = {*one.metrics, *(column.metric for column in one.columns)} - {"nq"}
        assert wanted & columns or (one.kind == "shift" and "sst2_styles_acc" in columns), one.name
        if one.x == "mix_rows":
            assert {item.factors.get("mix_rows", 0) for item in grid.cells} == {0, 500}


@pytest.mark.parametrize(
    ("metric", "scored", "stands"),
    [
        ("truthfulqa_mc1", 817, True),
        ("truthfulqa_mc1", 299, False),
        ("truthfulqa_mc2", 200, False),
        ("nq", 3610, True),
        ("nq", 100, False),
    ],
)
def test_a_benchmark_stands_beside_the_printed_one_only_with_all_of_its_items(
    metric: str, scored: int, stands: bool
) -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    GridStore(store, name="safety_freeze").commit_all()
    results = collect("safety_freeze", store)
    one, cells = exhibit("MoE-Bench", "Table 11"), []
    for cell in results.cells:
        document = {**cell.document, "parameters": {"total": 6919e6}}
        cells.append(replace(cell, metrics={metric: 0.25}, number={metric: scored}, document=document))
    shown = replace(results, cells=tuple(cells))
    row = next(row for row in one.rows if measured.match(shown, one, row))
    column = next(column for column in one.columns if column.metric == metric)
    assert measured.text(shown, one, row, column).startswith("0.2500")
    said = measured.otherwise(shown, one, row, column)
    assert (said == "") == stands
    assert stands or f"{scored} items here" in said
