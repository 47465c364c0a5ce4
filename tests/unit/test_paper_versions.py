"""An exhibit is made of the newest run of its grid that has what it shows: a later, smaller one hides nothing."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest

from orchestrator.report import paper
from orchestrator.report.papers.versions import Versions
from orchestrator.store import Store
from tests.grid_store import GridStore

NAME = "finetune_freeze"


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def run(store: Store, settings: tuple[str, ...], seeds: tuple[int, ...], *, probes: bool = True) -> GridStore:
    """Leave the results of a run with other factors, later than all before it."""
    time.sleep(0.002)
    grid = GridStore(store, name=NAME, settings=settings, seeds=seeds, probes=probes)
    grid.commit_all()
    return grid


def test_a_later_run_without_probes_hides_no_figure_of_an_earlier_one(store: Store, tmp_path: Path) -> None:
    whole = run(store, ("none", "router", "expert", "none->router"), (0, 1))
    before = {i.exhibit.name: i for i in paper.write(store, tmp_path / "before") if i.exhibit.paper == "MoE-Bench"}
    small = run(store, ("none",), (0,), probes=False)
    after = {i.exhibit.name: i for i in paper.write(store, tmp_path / "after") if i.exhibit.paper == "MoE-Bench"}
    assert {name for name, item in before.items() if item.files} == {n for n, item in after.items() if item.files}
    for made in before.values():
        for name in made.files:
            assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name
    earlier = f"{NAME}-{str(whole.document['digest'])[:8]}"
    assert (tmp_path / "after" / earlier / "index.html").exists()
    assert (tmp_path / "after" / NAME / "index.html").exists(), "the newest has a report of its own"
    page = (tmp_path / "after" / "index.html").read_text(encoding="utf-8")
    assert f'href="{earlier}/index.html"' in page
    assert any("made of an earlier run" in note for note in after["Figure 4"].notes)
    assert not any("earlier run" in note for item in before.values() for note in item.notes)
    newest = Versions(store).newest(NAME)
    assert newest is not None
    assert newest.document["digest"] == small.document["digest"]


def test_of_two_whole_runs_the_newest_is_shown(store: Store, tmp_path: Path) -> None:
    run(store, ("none", "router", "expert", "none->router"), (0, 1))
    run(store, ("none", "router", "expert", "none->router"), (0, 1, 2))
    item = next(
        i for i in paper.write(store, tmp_path) if (i.exhibit.paper, i.exhibit.name) == ("MoE-Bench", "Table 4")
    )
    assert not any("earlier run" in note for note in item.notes)
    assert sorted(path.parent.name for path in tmp_path.glob("*/index.html")) == [NAME]


def test_an_earlier_run_of_another_scale_is_no_substitute_for_the_newest_that_makes_it(
    store: Store, tmp_path: Path
) -> None:
    first = run(store, ("none", "router", "expert", "none->router"), (0, 1))
    small = dict(first.document, scale="small", digest="f" * 64)
    time.sleep(0.002)
    store.write_root(NAME, "f" * 64, small)  # the newest, of the same results
    grid = run(store, ("none", "router"), (0,))
    found = paper.write(store, tmp_path)
    item = next(i for i in found if (i.exhibit.paper, i.exhibit.name) == ("MoE-Bench", "Table 4"))
    assert item.files
    versions = Versions(store)
    _, results = versions.make(item.exhibit, paper.MAKERS[item.exhibit.kind])
    assert results is not None
    assert results.document["scale"] == "tiny", grid.name
