"""The report: from the store alone, the same numbers in every form, nothing claimed that the data do not resolve."""

from __future__ import annotations

import csv
import io
import json
import re
import uuid
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.report import formats, html, tables
from orchestrator.report.collect import BLOCKED, DONE, FAILED, PENDING, RUNNING, Results, collect
from orchestrator.report.differences import best, to_baseline
from orchestrator.report.facts import device_hours
from orchestrator.report.routing import overlap
from orchestrator.report.script import HASH
from orchestrator.report.svg import ticks
from orchestrator.report.words import named, words_of
from orchestrator.store import Manifest, Store
from tests.grid_store import GridStore

EFFECTS = {"expert": 0.08, "router": -0.05, "none->router": 0.0}


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def finished(store: Store, **arguments: object) -> Results:
    grid = GridStore(store, effects=EFFECTS, **arguments)  # type: ignore[arg-type]
    grid.commit_all()
    return collect(grid.name, store)


def test_settings_group_the_seeds_and_metrics_start_with_the_primary_ones(store: Store) -> None:
    results = finished(store)
    assert [s.name for s in results.settings] == [f"freeze={s}" for s in ("none", "router", "expert", "none->router")]
    assert all(len(s.cells) == 3 for s in results.settings)
    assert results.metrics[:2] == ("answer_bpb", "bits_per_byte")
    assert all(cell.state == DONE for cell in results.cells)
    assert all(set(cell.by_at) == {0.5, 1.0} for cell in results.cells)


def test_missing_cells_say_why(store: Store) -> None:
    grid = GridStore(store, seeds=(0,))
    none, router = grid.cell("none", 0), grid.cell("router", 0)
    expert, late = grid.cell("expert", 0), grid.cell("none->router", 0)
    grid.commit(grid.base)
    grid.commit_all(none["stages"][1:])
    grid.fail(grid.submit("one", router["stages"][1:2]), router["stages"][1])
    store.claims.claim(expert["stages"][1], grid.submit("two", expert["stages"][1:2]), 600)
    states = {cell.setting: (cell.state, cell.reason) for cell in collect("demo", store).cells}
    assert states["freeze=none"][0] == DONE
    assert states["freeze=router"] == (FAILED, "router 0-10: nan: the loss is not finite")
    assert states["freeze=expert"] == (RUNNING, "running: expert 0-10")
    assert states["freeze=none->router"] == (PENDING, "not run yet")
    assert late["stages"][1] == none["stages"][1]
    table = formats.terminal(tables.headline(collect("demo", store)))
    assert "missing in freeze=router: router 0-10: nan: the loss is not finite" in table


def test_a_failed_shared_stage_blocks_its_cells(store: Store) -> None:
    grid = GridStore(store, seeds=(0,))
    grid.fail(grid.submit("one", [grid.base]), grid.base, kind="oom", message="out of memory")
    results = collect("demo", store)
    assert {cell.state for cell in results.cells} == {BLOCKED}
    assert "blocked by pretrain: oom" in results.cells[0].reason


def test_real_differences_are_resolved_and_others_told_apart_from_nothing(store: Store) -> None:
    results = finished(store, seeds=(0, 1, 2, 3))
    found = to_baseline(results, ["bits_per_byte"])
    assert found["freeze=expert", "bits_per_byte"].resolved
    assert found["freeze=expert", "bits_per_byte"].difference == pytest.approx(0.08, abs=0.01)
    tie = found["freeze=none->router", "bits_per_byte"]
    assert not tie.resolved
    assert "not resolved" in tie.verdict()
    assert ("freeze=none", "bits_per_byte") not in found
    assert best(results, "bits_per_byte") == "freeze=router"
    assert best(results, "load_balance") == ""


def test_a_setting_that_differs_in_two_factors_is_not_compared(store: Store) -> None:
    grid = GridStore(store)
    grid.commit_all()

    def crossed(cell: dict[str, Any]) -> dict[str, Any]:
        if cell["factors"]["freeze"] != "router" or cell["factors"]["seed"] == 0:
            return cell
        return {**cell, "setting": "freeze=router lr=1", "factors": {**cell["factors"], "lr": 1.0}}

    document = {**grid.document, "cells": [crossed(c) for c in grid.cells], "factors": ["freeze", "lr", "seed"]}
    results = collect(document, store)
    settings = {s.name: s for s in results.settings}
    assert results.comparable(settings["freeze=router"])[0] is settings["freeze=none"]
    assert results.comparable(settings["freeze=router lr=1"])[0] is None
    assert "more than one factor: freeze, lr" in results.comparable(settings["freeze=router lr=1"])[1]


def test_factors_that_always_move_together_are_one_axis(store: Store) -> None:
    grid = GridStore(store)
    grid.commit_all()
    cells = [{**c, "factors": {**c["factors"], "width": len(c["factors"]["freeze"])}} for c in grid.cells]
    results = collect({**grid.document, "cells": cells, "factors": ["freeze", "width", "seed"]}, store)
    assert all(results.comparable(s)[0] is results.settings[0] for s in results.settings[1:])


def test_accuracies_at_chance_are_marked_and_never_ranked(store: Store) -> None:
    results = finished(store)
    table = tables.headline(results)
    column = table.columns.index("arc_easy/acc")
    assert {entries[column].mark for _, entries in table.rows} == {"?"}
    assert best(results, "arc_easy/acc") == ""


@pytest.mark.parametrize(
    ("moe", "ranked"),
    [
        ({"choice": "expert", "train_select": "topc", "eval_select": "topc"}, False),
        ({"preset": "expert_choice"}, False),
        ({"preset": "expert_choice", "train_select": "threshold", "eval_select": "threshold"}, True),
        ({"unit": "sentence", "pool": "full_mean"}, False),
        ({"unit": "token", "pool": "full_mean"}, True),
        ({"preset": "of another version", "choice": "expert", "train_select": "topc", "newer": 1}, False),
    ],
)
def test_leaky_routers_are_not_ranked_by_their_loss(store: Store, moe: dict[str, object], ranked: bool) -> None:
    grid = GridStore(store, effects=EFFECTS, seeds=(0, 1, 2, 3))
    grid.commit_all()
    cells = [
        {**c, "resolved": {**c["resolved"], "model": {"moe": moe}}} if c["factors"]["freeze"] == "router" else c
        for c in grid.cells
    ]
    results = collect({**grid.document, "cells": cells}, store)
    assert (best(results, "bits_per_byte") == "freeze=router") == ranked
    row = next(entries for labels, entries in tables.headline(results).rows if labels[0] == "router")
    assert (row[1].mark == "~") != ranked


def test_all_forms_show_the_same_numbers(store: Store, tmp_path: Path) -> None:
    results = finished(store)
    table = tables.headline(results)
    rows = list(csv.DictReader(io.StringIO(formats.as_csv(table))))
    tex = [line for line in formats.latex(table).splitlines() if line.endswith(r"\\")][1:]
    objects = json.loads(formats.as_json(table))["rows"]
    markdown = formats.markdown(table).splitlines()[2:]
    page = texts(html.page(results))
    for i, row in enumerate(rows):
        for metric in table.columns:
            mean, half = objects[i][metric]["mean"], objects[i][metric]["high"] - objects[i][metric]["mean"]
            shown = f"{row[metric]} ± {half:.4f}"
            assert float(row[f"{metric}_high"]) == pytest.approx(mean + half, abs=6e-5)
            assert shown in markdown[i]
            assert shown.replace("±", r"$\pm$") in tex[i]
            assert shown in page
            assert f"{objects[i][metric]['mean']:.4f}" == row[metric]


def test_the_page_is_self_contained_and_escapes_what_a_grid_says(store: Store, tmp_path: Path) -> None:
    results = finished(store, settings=("none", "<script>alert(1)</script>", "router"))
    path = html.write(results, tmp_path / "out" / "index.html")
    text = path.read_text()
    assert text.count("<script") == 1
    assert f"script-src '{HASH}'" in text, "the page runs its own script and no other"
    assert "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", text)
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text
    assert {p.name for p in path.parent.iterdir()} == {
        "index.html", "table.csv", "table.tex", "table.md", "differences.csv", "differences.tex", "cells.csv",
        "figures",
    }  # fmt: skip
    checker = Balance()
    checker.feed(text)
    assert checker.open == []


def test_rows_of_cells_hold_factors_first_and_unrounded_metrics(store: Store) -> None:
    results = finished(store)
    rows = tables.long_rows(results)
    assert list(rows[0])[:4] == ["freeze", "seed", "state", "reason"]
    assert len(rows) == 12
    again = list(csv.DictReader(io.StringIO(formats.render_rows(rows, "csv"))))
    assert float(again[0]["answer_bpb"]) == rows[0]["answer_bpb"]
    assert json.loads(formats.render_rows(rows, "json"))[0]["answer_bpb"] == rows[0]["answer_bpb"]


def test_sharing_saves_device_hours(store: Store) -> None:
    used, unshared = device_hours(finished(store))
    assert used < unshared


def test_two_grids_are_compared_setting_by_setting(store: Store) -> None:
    first = finished(store, name="first")
    grid = GridStore(store, name="second", settings=("none", "router"), effects={"router": 0.5})
    grid.commit_all()
    table = tables.grids(first, collect("second", store))
    assert [labels for labels, _ in table.rows] == [("freeze=none",), ("freeze=router",)]
    assert any("in one grid alone" in note for note in table.notes)


def test_scores_of_another_protocol_say_so(store: Store) -> None:
    results = finished(store)
    assert not any("protocol" in note or "fp32" in note for note in tables.headline(results).notes)

    def other(manifest: Manifest) -> Manifest:
        info = {"shots": "shared", "loglikelihood_deviation": 0.25} if manifest.kind == "evaluate" else {}
        return replace(manifest, info={**manifest.info, **info})

    changed = replace(results, manifests={key: other(manifest) for key, manifest in results.manifests.items()})
    notes = tables.headline(changed).notes
    assert not any("TF32" in note for note in notes)
    rounded = {key: replace(one, numerics={**one.numerics, "tf32": True}) for key, one in results.manifests.items()}
    told = replace(results, manifests=rounded)
    assert any("scored with fp32 products in TF32" in note for note in tables.headline(told).notes)
    assert all("fp32 products in TF32" in one for found in tables.numerics(told).values() for one in found)
    assert any("another protocol" in note and "shots: shared" in note for note in notes)
    assert any("not scored in fp32" in note and "0.25 nats" in note for note in notes)


def test_a_page_of_a_running_grid_loads_itself_again_and_a_finished_one_does_not(store: Store) -> None:
    grid = GridStore(store, settings=("none", "router"), seeds=(0,))
    grid.commit_all(grid.cell("none", 0)["stages"])
    late = grid.cell("router", 0)["stages"][1]
    store.claims.claim(late, grid.submit("one", [late]), 600)
    assert 'http-equiv="refresh"' in html.page(collect("demo", store))
    grid.commit_all()
    assert 'http-equiv="refresh"' not in html.page(collect("demo", store))


def test_every_metric_has_its_differences_drawn(store: Store) -> None:
    page = html.page(finished(store))
    for metric in ("answer_bpb", "load_balance", "collaboration", "specialization"):
        assert f'aria-label="differences to the baseline in {words_of(metric)}' in page


def test_what_a_run_costs_stands_beside_what_it_brings_and_leads_to_its_meaning(store: Store) -> None:
    page = html.page(finished(store))
    assert "<span>cost</span>" in page
    for column in ("cost/active", "cost/flops", "cost/hours"):
        assert f'href="#def-{column}"' in page
        assert f'<dt id="def-{column}">' in page
    assert 'data-v="1.2">1.2</td><td data-v="7.2">7.2</td>' in page  # 1,200,000 parameters, 7,200,000 FLOPs


def test_a_number_says_whose_it_is_where_a_grid_has_several_factors() -> None:
    assert named({"freeze": "none->router", "router_lr_ratio": ""}) == "none->router"
    assert named({"freeze": "", "router_lr_ratio": 0.5}) == "router_lr_ratio=0.5"
    assert named({"lr": 0.5}) == "0.5"


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1.93, 2.07)[0] >= 1.93
    assert ticks(3.0, 3.0) == [3.0]


def test_probe_arrays_become_routing_figures(store: Store) -> None:
    grid = GridStore(store, settings=("none", "router"), seeds=(0,), probes=True)
    grid.commit_all()
    page = html.page(collect("demo", store))
    assert "router saturation" in page
    assert "cosine of the experts" in page


def test_one_flipped_byte_leaves_out_its_source_and_names_it(store: Store) -> None:
    grid = GridStore(store, settings=("none", "router"), seeds=(0,), probes=True)
    grid.commit_all()
    cell = grid.cell("router", 0)
    last = {result["suite"]: result["key"] for result in cell["results"]}
    chosen = {last["reasoning"]: "items.parquet", last["probe"]: "probe.npz", cell["final"]: "series.json"}
    for key, name in chosen.items():
        manifest = store.artifacts.get(key)
        assert manifest is not None
        path = manifest.blob(name).path
        data = bytearray(store.objects.get(path) or b"")
        data[len(data) // 2] ^= 0x10
        store.objects.put(path, bytes(data))
    results = collect("demo", store)
    page = html.page(results)
    assert "freeze=router" in page
    assert "router saturation" in page, "of the other cell"
    assert results.damaged.keys() == chosen.keys()
    assert all("sha256" in cause for cause in results.damaged.values())


def test_report_and_probe_agree_on_saturation() -> None:
    from jobs.probe.metrics import expert_change_rate, router_saturation

    rng = np.random.default_rng(0)
    first, last = (np.argsort(rng.random((3, 50, 8)), axis=-1)[..., :3] for _ in range(2))
    first[:, :7, 2] = -1
    last[:, 3:9, 0] = -1
    assert overlap(first, last) == pytest.approx(router_saturation(first, last))
    assert overlap(first, last, 1) == pytest.approx(router_saturation(first, last, 1))
    assert 1 - overlap(first, last) == pytest.approx(expert_change_rate(first, last))


class Balance(HTMLParser):
    """Tracks open elements; whatever stays open was never closed."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def texts(page: str) -> str:
    """Return the text of a page, without its marks."""
    return re.sub(r"<[^>]*>", "", page)


def test_a_grid_without_primary_metrics_has_no_empty_section(store: Store) -> None:
    GridStore(store, probes=True).commit_all()
    document = dict(collect("demo", store).document) | {"primary": []}
    page = html.page(collect(document, store))
    sections = re.findall(r'<section id="(\w+)"><h2>.*?</h2>(.*?)</section>', page, re.DOTALL)
    assert {name for name, _ in sections} == set(re.findall(r'<a href="#(\w+)">', page.split("</nav>")[0]))
    assert all(re.sub(r"<div[^>]*></div>", "", text).strip() for _, text in sections)
    assert "progress" in {name for name, _ in sections}, "the first metric stands in"
