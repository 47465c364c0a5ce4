"""The exhibits of LibMoE's vision-language half: panels a component, shares of several grids, parts of the data."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from orchestrator.report import html, paper, routing
from orchestrator.report.collect import Results, collect
from orchestrator.report.papers import drawn, forms, layers
from orchestrator.store import Store
from tests.grid_store import GridStore
from tests.unit.test_paper_exhibits import exhibit, finished, store

__all__ = ["store"]  # a fixture


def seen(store: Store) -> Results:
    """Return results of a grid of models that see, whose factor is the preset."""
    GridStore(store, name="libmoe_vlm", settings=("smoe", "xmoe"), seeds=(0,), sees=True).commit_all()
    results = collect("libmoe_vlm", store)
    cells = []
    for cell in results.cells:
        counted = {"encoder": 64e6, "connector": 4e6, "language": 1e6, "total": 69e6}
        document = {**cell.document, "parameters": counted}
        cells.append(replace(cell, factors={"preset": cell.factors["freeze"]}, document=document))
    return replace(results, cells=tuple(cells))


def test_parts_that_see_have_panels_of_their_own(store: Store) -> None:
    results = seen(store)
    assert not routing.last(results, results.cells[0]), "there is no probe of text"
    bars = layers.sets(results, exhibit("LibMoE", "Figure 6"))
    assert [part in figure for part, figure in zip(("encoder", "connector"), bars.figures, strict=True)] == [True, True]
    made = results.document["cells"][0]["results"][-2]["key"]
    with np.load(io.BytesIO(store.artifacts.read(results.manifests[made].blob("sight.npz")))) as arrays:
        for part, figure in zip(("encoder", "connector"), bars.figures, strict=True):
            assert f"{arrays[f'{part}.heldout.expert_allocation_entropy'].mean():.4f}" in figure
    told = html.page(results)
    assert [told.count(f"<summary>freeze=smoe: {part}<") for part in ("encoder", "connector")] == [1, 1]
    assert "<summary>freeze=smoe<" not in told
    margin, alike = (exhibit("LibMoE", name).variants[-1] for name in ("Figure 8", "Figure 10"))
    assert "encoder, heldout" in "".join(layers.layers(results, margin).figures)
    assert "encoder, experts" in "".join(layers.layers(results, alike).figures)
    lost = drawn.stacked(results, replace(exhibit("LibMoE", "Figure 5").variants[-1], metrics=("drop_top1",)))
    assert "connector" in lost.figures[0]
    ((name, *texts), _) = forms.components(results, exhibit("LibMoE", "Table 3")).tables[0].rows
    assert (name, texts) == ("freeze=smoe", ["64 M", "4 M", "1 M", "69 M"])


def test_a_second_grid_makes_its_share_of_an_exhibit(store: Store, tmp_path: Path) -> None:
    finished(store, "libmoe_vlm")
    alone = {i.exhibit.name: i for i in paper.write(store, tmp_path) if i.exhibit.paper == "LibMoE"}
    assert alone["Table 9"].files == ("libmoe_table_9_libmoe_vlm.csv", "libmoe_table_9_libmoe_vlm.tex")
    finished(store, "libmoe_algorithms")
    both = {i.exhibit.name: i for i in paper.write(store, tmp_path) if i.exhibit.paper == "LibMoE"}
    assert both["Table 9"].files == ("libmoe_table_9.csv", "libmoe_table_9.tex", *alone["Table 9"].files)
    assert all((tmp_path / name).exists() for name in both["Table 9"].files)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("report of libmoe_vlm</a>; ") + page.count('; ours at scale tiny: <a href="libmoe_vlm') == 1


def test_the_parts_of_a_data_set_are_its_rows_by_subtask(store: Store) -> None:
    results = seen(store)
    data = {"source": "file://shown", "rows": 0}
    old = next(iter(results.manifests.values()))
    assert not old.spec, "the store's index leaves specs out, and reports read it"
    made = replace(old, key="d" * 64, kind="data", info={"subtasks": {"group": 30, "colour": 10}})
    warmed = replace(made, key="e" * 64, info={"subtasks": {"group": 5}})
    tokens = [
        replace(old, key=c * 64, kind="tokens", info={}, parents={of.key: ""})
        for c, of in zip("ab", (made, warmed), strict=True)
    ]
    phases = zip("12", ("instruct", "warm"), tokens, strict=True)
    trained = [replace(old, key=c * 64, kind="train", info={"phase": p}, parents={t.key: ""}) for c, p, t in phases]
    stages = {manifest.key: manifest for manifest in (made, warmed, *tokens, *trained)}
    cells = []
    for cell in results.cells:
        document = {**cell.document, "resolved": {"instruct": {"data": data}}, "stages": list(stages)}
        cells.append(replace(cell, document=document))
    manifests = {**results.manifests, **stages}
    shown = drawn.parts(replace(results, cells=tuple(cells), manifests=manifests), exhibit("LibMoE", "Figure 13"))
    assert len(shown.figures) == 1
    for text in ("file://shown, 40 rows", "group", "colour", "30"):
        assert text in shown.figures[0]
