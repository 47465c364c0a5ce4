"""The report's opening says what the statistics say, no more: what differs, how surely, what would answer the rest."""

from __future__ import annotations

import re
import uuid
from html.parser import HTMLParser

import numpy as np
import pytest

from orchestrator.report import answer, html, picture, result_tables, sections, svg
from orchestrator.report.collect import Results, collect
from orchestrator.report.differences import to_baseline
from orchestrator.report.plots import Line, Spot, curves, heatmap, scatter
from orchestrator.report.statistics import Comparison
from orchestrator.report.words import grouped, words_of, written
from orchestrator.store import Store
from tests.grid_store import GridStore

EFFECTS = {"expert": 0.08, "router": -0.05, "none->router": 0.0}


def finished(**arguments: object) -> Results:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    grid = GridStore(store, effects=EFFECTS, **arguments)  # type: ignore[arg-type]
    grid.commit_all()
    return collect(grid.name, store)


def plain(text: str) -> str:
    return re.sub(r"<[^>]*>", " ", text).replace("&gt;", ">")


def test_where_the_results_chose_the_seeds_no_further_ones_are_advised_after_the_look() -> None:
    results = finished(seeds=(0, 1, 2))
    adaptive = {"metric": "answer_bpb", "halfwidth": None, "race": "baseline", "max_seeds": 8}
    raced = collect(dict(results.document) | {"adaptive": adaptive, "digest": "raced"}, results.store)
    steps = answer.next_steps(raced, "moegrid run demo")
    assert steps == ["what is open would hardly be resolved within adaptive.max_seeds 8; a larger one asks anew"]
    usual = to_baseline(results, ["answer_bpb"])["freeze=none->router", "answer_bpb"]
    wider = to_baseline(raced, ["answer_bpb"])["freeze=none->router", "answer_bpb"]
    assert wider.difference == usual.difference
    assert (wider.high or 0) - (wider.low or 0) > 2 * ((usual.high or 0) - (usual.low or 0))


def test_the_opening_says_what_was_compared_what_differs_and_how_surely() -> None:
    results = finished(seeds=(0, 1, 2, 3))
    text = plain(answer.answer(results, "moegrid run demo --seeds 0,1,2,3"))
    assert "4 settings of  freeze  at scale  tiny , 4 seeds each" in text
    assert "expert is worse than none on answer_bpb: +0.0" in text
    assert "router is better than none on answer_bpb: -0.0" in text
    one = to_baseline(results, ["answer_bpb", "bits_per_byte"])["freeze=none->router", "answer_bpb"]
    assert not one.resolved
    assert f"none->router is not resolved from none on answer_bpb: {one.difference:+.4f}" in text
    assert "4 seeds; " in text
    assert "UTC" in text
    assert "moegrid run demo --seeds 0,1,2,3" in text


def test_a_sentence_never_claims_what_is_not_resolved() -> None:
    near = Comparison(-0.002, 2, low=-0.033, high=0.029, p=0.5, adjusted=0.5, needed=40, stderr=0.01)
    told = answer.sentence("none->router", "none", "answer_bpb", near)
    assert told == (
        "none->router is not resolved from none on answer_bpb: -0.0020 ± 0.0310, 2 seeds; about 40 seeds would do"
    )
    sure = Comparison(-0.02, 3, low=-0.03, high=-0.01, p=0.001, adjusted=0.001, stderr=0.002)
    assert answer.sentence("a", "b", "answer_bpb", sure).startswith("a is better than b")
    assert answer.sentence("a", "b", "reasoning_avg", sure).startswith("a is worse than b")
    assert answer.sentence("a", "b", "router_margin", sure).startswith("a differs from b")


def test_one_seed_asks_for_more_and_a_failure_for_a_resume() -> None:
    steps = answer.next_steps(finished(seeds=(0,)), "moegrid run demo")
    assert any("one seed tells no difference" in step and "--seeds 0,1,2" in step for step in steps)
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    grid = GridStore(store, seeds=(0,))
    grid.commit(grid.base)
    stage = grid.cell("router", 0)["stages"][1]
    grid.fail(grid.submit("one", [stage]), stage)
    assert any("moegrid resume demo" in step for step in answer.next_steps(collect("demo", store), "moegrid run demo"))


def test_no_sweet_point_without_a_resolved_difference() -> None:
    same = finished(settings=("none", "none->router"), seeds=(0, 1))
    text = sections.pareto(same)
    assert "Sweet points" not in text
    sure = sections.pareto(finished(seeds=(0, 1, 2, 3)))
    assert "Sweet points (resolved" not in sure or "freeze=router" in sure


def test_every_column_is_written_out_grouped_and_defined() -> None:
    results = finished()
    table, defined = result_tables.results_table(results), result_tables.definitions(results)
    assert words_of("load_balance") == "load balance (bits)"
    assert written("arc_easy/acc").name == "arc_easy: accuracy"
    assert [group for group, _ in grouped(["load_balance", "val_loss", "cona_llama_guard"])] == [
        "quality",
        "routing",
        "safety",
    ]
    for link in re.findall(r'href="#(def-[^"]+)"', table):
        assert f'id="{link}"' in defined
    columns = set(re.findall(r'<a href="#def-([^"]+)"', table.split("<div class='paper'>")[0]))
    assert columns == set(re.findall(r'<a href="#def-([^"]+)"', table.split("<div class='paper'>")[1]))


@pytest.mark.parametrize("names", [["short"] * 3, ["a" * 40, "b" * 40], ["c" * 200] * 14])
def test_legends_neither_touch_nor_leave_the_figure(names: list[str]) -> None:
    figure = curves([Line(name, [0.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]) for name in names], "loss")
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', figure)[1])
    taken: list[tuple[float, float, float]] = []
    keys = re.findall(r'<g class="key".*?</g>', figure, re.DOTALL)
    for key in keys:
        lines = re.findall(r'<(?:text|tspan) x="([\d.]+)" y="([\d.]+)">([^<]+)</', key)
        assert "".join(text for _, _, text in lines) in names
        for x, y, text in lines:
            left, right, low = float(x) - 28, float(x) + svg.CHARACTER * len(text), float(y)
            assert right <= 720
            assert low <= height
            assert not any(abs(low - y0) < 12 and left < r0 and l0 < right for l0, r0, y0 in taken)
            taken.append((left, right, low))
    assert len(keys) == len(names)


def test_large_maps_are_one_picture_and_the_page_stays_small() -> None:
    size = 64
    values = {(i, j): float(v) for (i, j), v in np.ndenumerate(np.random.default_rng(0).random((size, size)))}
    figure = heatmap([str(i) for i in range(size)], [str(i) for i in range(size)], values, label="pairs")
    assert figure.count("<image") == 1
    assert len(figure) < 30_000, "4,096 squares of their own would take 800 kB"
    png = picture._png(2, 1, b"\0" + bytes(8))
    assert png.startswith(b"\x89PNG")


def test_the_page_runs_its_own_script_and_is_well_formed() -> None:
    page = html.page(finished(probes=True))

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not any(name.startswith("on") for name, _ in attrs)
            if tag in ("section", "table", "svg", "details", "div"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag in ("section", "table", "svg", "details", "div"):
                assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_labels_of_a_scatter_keep_off_the_axis_and_its_numbers() -> None:
    spots = [Spot(f"freeze=setting_{i}", 1.0 + i / 1000, 1.2, i == 0, "") for i in range(6)]
    drawn = scatter([*spots, Spot("freeze=router", 1.003, 1.5, False, "")], "load balance", "loss")
    axis = float(re.search(r'class="axis"[^>]*y1="([0-9.]+)"', drawn)[1])
    labels = re.findall(r'<text class="small" x="[0-9.]+" y="([0-9.]+)" text-anchor="[a-z]+">freeze=', drawn)
    assert len(labels) >= 3
    assert all(float(y) + 3 <= axis for y in labels)


def test_a_schedule_is_not_broken_at_its_arrow() -> None:
    page = html.page(finished(seeds=(0,)))
    assert '<th scope="row"><span class="whole">none-&gt;router</span> <span class="quiet">(1 seed)</span>' in page
