"""The papers' exhibits: all are listed, each is made in its own form, nothing stands beside what it does not equal."""

from __future__ import annotations

import csv
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.grid.files import grid_names
from orchestrator.grid.load import load_grid
from orchestrator.report import charts, html, paper, routing
from orchestrator.report.collect import CellResult, Results, Setting, collect
from orchestrator.report.papers import drawn, forms, layers, measured
from orchestrator.report.papers.choice import short_names
from orchestrator.report.papers.declared import Column, Exhibit, declared
from orchestrator.report.routing import changed_share
from orchestrator.store import Store
from tests.grid_store import GridStore


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def finished(store: Store, name: str) -> Results:
    GridStore(store, name=name, probes=True).commit_all()
    return collect(name, store)


def exhibit(paper_name: str, name: str) -> Exhibit:
    return next(e for e in declared().exhibits if (e.paper, e.name) == (paper_name, name))


def changed(results: Results, change: dict[str, object]) -> Results:
    """Return the results with other fields of every cell."""
    cells = tuple(replace(cell, **change) for cell in results.cells)  # type: ignore[arg-type]
    return replace(results, cells=cells)


def test_every_exhibit_is_declared_once_with_a_grid_and_form_that_exist() -> None:
    exhibits = declared().exhibits
    counted = Counter((e.paper, e.name.split()[0]) for e in exhibits)
    assert counted == {
        ("MoE-Bench", "Table"): 12,
        ("MoE-Bench", "Figure"): 9,
        ("LibMoE", "Table"): 9,
        ("LibMoE", "Figure"): 25,
        ("MoE-RBench", "Table"): 11,
        ("MoE-RBench", "Figure"): 7,
    }
    assert len({(e.paper, e.name) for e in exhibits}) == 73
    for one in exhibits:
        assert one.kind in paper.MAKERS or one.kind == "none"
        assert (one.kind == "none") == bool(one.lacks)
        assert all(variant.grid in grid_names() for variant in one.variants) or one.lacks
    for grid, words in declared().runs.items():
        sources = [word for word in words.split() if not word.endswith(("=FOLDER", "=FILE"))]
        assert load_grid(grid, overrides=tuple(sources)).cells


def test_every_printed_column_says_how_it_was_measured() -> None:
    for one in declared().exhibits:
        if one.printed and not one.vision and "temperature" not in one.labels:
            unknown = {column.name for column in one.columns if not column.metric and not column.mean}
            assert unknown <= {"avg_rank"}, one.name


def test_without_results_all_are_listed_with_what_makes_them(store: Store, tmp_path: Path) -> None:
    shown = paper.write(store, tmp_path / "paper")
    assert len(shown) == 73
    assert not (tmp_path / "paper").exists()
    commands = {item.command for item in shown}
    assert "moegrid run pretrain_architecture" in commands
    assert all(item.reason for item in shown)


def test_a_run_grid_makes_its_exhibits_in_their_own_forms(store: Store, tmp_path: Path) -> None:
    finished(store, "finetune_freeze")
    shown = {(i.exhibit.paper, i.exhibit.name): i for i in paper.write(store, tmp_path)}
    for name in ("Table 1", "Table 2", "Table 4", "Table 7", "Figure 1", "Figure 4", "Figure 5"):
        item = shown["MoE-Bench", name]
        assert item.files, item.reason
        assert all((tmp_path / file).exists() for file in item.files)
    assert {item.exhibit.grid for item in shown.values() if item.files} == {"finetune_freeze"}
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "MoE-RBench, Figure 5" in page
    assert (tmp_path / "index.md").read_text(encoding="utf-8").count("\n") == 75
    own = list(csv.DictReader((tmp_path / "moe-bench_table_4.csv").open(encoding="utf-8")))
    assert "±" in own[0]["arc_easy"]
    printed = list(csv.DictReader((tmp_path / "moe-bench_table_4.printed.csv").open(encoding="utf-8")))
    assert printed[0]["arc_easy"] == "78.75"
    assert not any(name.endswith("(ours)") for name in printed[0])


@pytest.mark.parametrize(
    ("parameters", "shots", "limit", "stands"),
    [(6919, 25, 0, True), (3.9, 25, 0, False), (6919, 3, 0, False), (6919, 25, 80, False)],
)
def test_ours_stands_beside_a_printed_value_only_when_measured_in_the_same_way(
    store: Store, parameters: float, shots: int, limit: int, stands: bool
) -> None:
    results = finished(store, "finetune_freeze")
    tasks = [{"name": "arc_easy", "metric": "acc", "shots": shots, "limit": limit}]
    cells = []
    for cell in results.cells:
        resolved = {**cell.document["resolved"], "evaluate": {"tasks": tasks}}
        document = {**cell.document, "resolved": resolved, "parameters": {"total": parameters * 1e6}}
        cells.append(replace(cell, document=document))
    made = forms.table(replace(results, cells=tuple(cells)), exhibit("MoE-Bench", "Table 4"))
    printed = made.tables[1]
    assert ("arc_easy (ours)" in printed.header) == stands
    if stands:
        at = printed.header.index("arc_easy (ours)")
        assert "±" in printed.rows[0][at]
        assert printed.rows[0][printed.header.index("mmlu (ours)")] == ""
    else:
        assert any("stand apart" in note for note in made.lacks)


def libmoe(results: Results, total: float) -> Results:
    """Return results as of LibMoE's sparse model with its nine tasks at no shots."""
    names = {c.metric.partition("/")[0] for c in exhibit("LibMoE", "Table 2").columns if c.shots is not None}
    tasks = [{"name": name, "metric": "acc", "shots": 0, "limit": 0} for name in sorted(names)]
    cells = []
    for cell in results.cells[:1]:
        resolved = {"evaluate": {"tasks": tasks}, "model": {"backbone": "olmoe"}}
        metrics = {"val_loss": 2.0, **{f"{name}/acc": 0.1 * i for i, name in enumerate(sorted(names), 1)}}
        document = {**cell.document, "resolved": resolved, "parameters": {"total": total}}
        cells.append(replace(cell, factors={"preset": "smoe"}, metrics=metrics, document=document))
    return replace(results, cells=tuple(cells))


def test_columns_find_their_own_metric_and_rows_their_own_size(store: Store) -> None:
    one = exhibit("LibMoE", "Table 2")
    results = libmoe(finished(store, "libmoe_algorithms"), 158e6)
    made = forms.table(results, one)
    ours = dict(zip(made.tables[0].header, made.tables[0].rows[0], strict=True))
    assert ours["ppl"] == "7.39"  # exp(2)
    assert ours["lambada"] == "60.00"  # the sixth of nine tasks by name
    assert ours["siqa"] == "90.00"
    assert ours["avg"] == "50.00"
    printed = made.tables[1]
    at = printed.header.index("lambada (ours)")
    by_scale = {row[0]: row[at] for row in printed.rows if row[1] == "SMoE"}
    assert by_scale == {"158m": "60.00", "679m": ""}


def test_the_dense_twins_of_two_sizes_are_one_row_of_ours_and_a_reason_is_told_once(store: Store) -> None:
    results = libmoe(finished(store, "libmoe_algorithms"), 0.7e6)
    dense = replace(results, cells=tuple(replace(cell, factors={"preset": "dense"}) for cell in results.cells))
    made = forms.table(dense, exhibit("LibMoE", "Table 2"))
    assert [row[0] for row in made.tables[0].rows] == ["Dense"]
    assert made.tables[0].caption == "ours at scale tiny"
    (told,) = [note.partition(": ")[2] for note in made.lacks if note.startswith("printed values stand apart")]
    reasons = told.split("; ")
    assert len(reasons) == len(set(reasons))
    assert "0.7 M parameters here, 36 M there" in reasons


def test_a_head_is_as_wide_as_it_is_where_no_width_is_set(store: Store) -> None:
    results = finished(store, "libmoe_algorithms")
    cells = []
    for cell in results.cells:
        model = {"hidden_size": 512, "num_heads": 4, "head_dim": 82 if cell.factors["freeze"] == "none" else 0}
        resolved = {**cell.document["resolved"], "model": model}
        document = {**cell.document, "resolved": resolved}
        cells.append(replace(cell, document=document, factors={"preset": cell.factors["freeze"]}))
    made = forms.settings(replace(results, cells=tuple(cells)), exhibit("LibMoE", "Table 5"))
    row = next(row for row in made.tables[0].rows if row[0] == "head width")
    assert row[2:4] == ("82", "128")


def test_the_mean_of_other_tasks_is_no_average_of_the_papers(store: Store) -> None:
    results = libmoe(finished(store, "libmoe_algorithms"), 158e6)
    cells = []
    for cell in results.cells:
        kept = {name: value for name, value in cell.metrics.items() if not name.startswith("race/")}
        cells.append(replace(cell, metrics={**kept, "reasoning_avg": 0.99}))
    made = forms.table(replace(results, cells=tuple(cells)), exhibit("LibMoE", "Table 2"))
    ours = dict(zip(made.tables[0].header, made.tables[0].rows[0], strict=True))
    assert ours["avg"] == ""
    assert any("race" in note for note in made.lacks)


def test_probes_make_curves_maps_and_panels(store: Store) -> None:
    results = finished(store, "libmoe_algorithms")
    cells = [replace(cell, factors={"preset": cell.factors["freeze"]}) for cell in results.cells]
    results = replace(results, cells=tuple(cells))
    assert len(drawn.curves(results, exhibit("LibMoE", "Figure 15")).figures) == 2
    assert not drawn.curves(results, exhibit("LibMoE", "Figure 3"))  # two states have one change, which is no curve
    shown = layers.layers(results, exhibit("LibMoE", "Figure 8"))
    assert shown.figures
    assert "heldout" in shown.figures[0]
    maps = layers.coactivation(results, replace(exhibit("LibMoE", "Figure 12"), where={"preset": ("none",)}))
    assert len(maps.figures) >= 2
    assert layers.loads(results, replace(exhibit("LibMoE", "Figure 17"), where={})).figures


@pytest.mark.parametrize(
    ("settings", "factor", "told"),
    [
        (
            [{"preset": "smoe", "granularity": "4/18"}, {"preset": "v2", "granularity": "2/16+2"}],
            "preset",
            ["smoe", "v2"],
        ),
        ([{"preset": "v2", "top": 2, "start": "x"}, {"preset": "v2", "top": 2, "start": ""}], "start", ["x, v2", "v2"]),
        ([{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 1, "b": 3}], "a", ["1, 1", "2, 2", "1, 3"]),  # b alone would do
        ([{"preset": "v2", "rate": 1}, {"preset": "v2", "rate": 2}], "preset", ["1", "2"]),
        ([{"rate": 0.1}, {"rate": 0.2}], "", ["0.1", "0.2"]),
        ([{"rate": 0.1}], "rate", ["0.1"]),
        ([{}], "", ["s0"]),
        (
            [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 2, "b": 2}],
            "b",
            ["1, 1", "2, 1", "1, 2", "2, 2"],
        ),
    ],
)
def test_legends_have_the_fewest_words_that_tell_settings_apart(
    settings: list[dict[str, object]], factor: str, told: list[str]
) -> None:
    made = [Setting(f"s{number}", factors, ()) for number, factors in enumerate(settings)]
    assert short_names(made, factor) == {f"s{number}": text for number, text in enumerate(told)}


def test_the_share_of_tokens_with_another_set_is_not_the_share_of_choices() -> None:
    before = np.array([[[0, 1], [2, 3], [4, 5], [6, 7]]])
    after = np.array([[[1, 0], [2, 9], [8, 9], [6, 7]]])
    assert changed_share(before, after) == 0.5


def test_bars_draw_their_average_and_say_where_the_axis_begins() -> None:
    drawn_bars = charts.bars([charts.Bar("a", 0.50), charts.Bar("b", 0.52, 0.51, 0.53, strong=True)], "accuracy")
    assert "average 0.5100" in drawn_bars
    assert "axis begins at" in drawn_bars
    assert 'class="marked"' in drawn_bars
    assert "axis begins at" not in charts.bars([charts.Bar("a", -0.1), charts.Bar("b", 0.2)], "capacity")


def test_a_radar_puts_the_best_outside_also_where_lower_is_better(store: Store) -> None:
    results = finished(store, "rbench_robustness")
    names = ("val_loss", "bits_per_byte", "load_balance")
    cells: Iterable[CellResult] = (
        replace(cell, metrics=dict.fromkeys(names, 2.0 if cell.factors["freeze"] == "none" else 4.0))
        for cell in results.cells
    )
    shown = replace(results, cells=tuple(cells))
    one = replace(
        exhibit("MoE-Bench", "Figure 1"), metrics=names, lines={"freeze": ("none", "router")}, panels="", where={}
    )
    figure = drawn.radar(shown, one).figures[0]
    assert figure.count("<polygon") == 4 + 2
    assert "val_loss (lower)" in figure
    assert "load_balance (higher)" in figure


def test_the_report_of_a_grid_holds_its_printed_tables_and_their_errata(store: Store) -> None:
    page = html.page(finished(store, "finetune_freeze"))
    assert "Published values" in page
    assert "repeat the rows expert, router" in page


def test_a_row_of_another_backbone_is_not_ours(store: Store) -> None:
    results = finished(store, "finetune_freeze")
    assert measured.match(results, exhibit("MoE-Bench", "Table 4"), {"setting": "baseline"}) is not None
    cells = [replace(cell, factors={**cell.factors, "backbone": "olmoe"}) for cell in results.cells]
    olmoe = replace(results, cells=tuple(cells))
    assert measured.match(olmoe, exhibit("MoE-Bench", "Table 5"), {"setting": "baseline"}) is None
    column = Column("load_balance", "load_balance")
    assert measured.values(olmoe, exhibit("MoE-Bench", "Table 5"), {"setting": "baseline"}, column) == []


@pytest.mark.parametrize(("items", "stands"), [(0, True), (10, False)])
def test_temperatures_are_scored_on_the_items_of_interventions(store: Store, items: int, stands: bool) -> None:
    results = libmoe(finished(store, "libmoe_algorithms"), 158e6)
    cells = []
    for cell in results.cells:
        resolved = cell.document["resolved"]
        evaluate = {**resolved["evaluate"], "efficiency_limit": items}
        document = {**cell.document, "resolved": {**resolved, "evaluate": evaluate}}
        cells.append(replace(cell, metrics={"hellaswag/temperature_10": 0.25}, document=document))
    one = exhibit("LibMoE", "Table 7")
    row = next(r for r in one.rows if (r["scale"], r["temperature"], r["task"]) == ("158m", "10.0", "hellaswag"))
    column = next(c for c in one.columns if c.name == "smoe")
    shown = replace(results, cells=tuple(cells))
    assert measured.text(shown, one, row, column) == "25.00"
    assert (measured.otherwise(shown, one, row, column) == "") == stands


def test_what_is_declared_to_be_measured_otherwise_stands_apart(store: Store) -> None:
    """Perplexity is per token of a vocabulary, and RACE has two halves: neither compares, nor does their average."""
    one = exhibit("LibMoE", "Table 2")
    results = libmoe(finished(store, "libmoe_algorithms"), 158e6)
    row = next(row for row in one.rows if (row["scale"], row["method"]) == ("158m", "SMoE"))
    columns = {column.name: column for column in one.columns}
    said = {name: measured.otherwise(results, one, row, columns[name]) for name in ("ppl", "race", "avg", "lambada")}
    assert "another vocabulary" in said["ppl"]
    assert "high schools here" in said["race"]
    assert "high schools here" in said["avg"]
    assert said["lambada"] == ""


def test_each_backbone_has_its_own_response_from_0_to_1(store: Store) -> None:
    results = finished(store, "finetune_router_lr")
    values = {("olmoe", 0.5): 3.0, ("olmoe", 1.0): 5.0, ("deepseek_moe", 0.5): 9.0, ("deepseek_moe", 1.0): 8.0}
    cells = [
        replace(
            results.cells[0],
            setting=f"{backbone} {ratio}",
            factors={"backbone": backbone, "router_lr_ratio": ratio},
            metrics={"load_balance": value},
        )
        for (backbone, ratio), value in values.items()
    ]
    figure = drawn.response(replace(results, cells=tuple(cells)), exhibit("MoE-Bench", "Figure 8")).figures[0]
    assert "olmoe (3.0000 to 5.0000)" in figure
    assert "deepseek_moe (8.0000 to 9.0000)" in figure


def test_a_shift_of_routing_is_a_map_of_styles_by_layer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    results = finished(store, "rbench_robustness")
    moved = {"sst2_augment": np.array([0.1, 0.3]), "sst2_tweet_p0": np.array([0.5, 0.7])}
    moved["sst2_bible_p0"] = np.array([0.9, 1.1])
    monkeypatch.setattr(routing, "shifts", lambda results, cell: moved)
    made = layers.shift(results, replace(exhibit("MoE-RBench", "Figure 3"), where={}))
    figure = made.figures[0]
    for text in ("word-level", "sentence-level", "sst2_tweet_p0", "0.100", "0.700", "0.900"):  # 0.7 = (0.5 + 0.9) / 2
        assert text in figure
