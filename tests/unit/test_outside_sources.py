"""Sources of data of another package: pinned when a grid is read, told when wrong, read on the node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.data.item_files import item_blobs
from jobs.data.stage import read_rows
from orchestrator.catalog.sources import SOURCES
from orchestrator.data.pinning import pin
from orchestrator.errors import GridError
from orchestrator.files.problems import Mistake
from orchestrator.grid.load import Grid, load_grid
from orchestrator.spec.cell import DataSpec
from orchestrator.spec.work import DataWork
from tests.books import BOOKS, NAMES
from tests.packages import found, install


@pytest.fixture(autouse=True)
def books(tmp_path: Path) -> Iterator[Path]:
    install(tmp_path / "site", "books", BOOKS, NAMES)
    with found(tmp_path / "site", "books") as folder:
        yield folder


def load(folder: Path, source: str) -> Grid:
    path = folder / "g.yaml"
    head = "name: g\nbase: pretrain\nevaluate: [lm]\nfactors: {seed: [0]}\n"
    path.write_text(f"{head}set:\n  pretrain.data.source: {source}\n")
    return load_grid(str(path))


def test_a_grid_names_it_and_knows_it_by_its_digest(tmp_path: Path) -> None:
    primer, novel = (load(tmp_path, f"books://{book}").cells[0].cell.pretrain for book in ("primer", "novel"))
    assert primer is not None
    assert novel is not None
    assert len(primer.data.digest) == 64
    assert primer.data.digest != novel.data.digest
    rows = read_rows(primer.data)
    assert len(rows) == 60
    assert {row.source for row in rows} == {"books://primer"}


def test_its_version_is_in_the_key_of_its_data_alone() -> None:
    def key(source: str) -> str:
        return DataWork(DataSpec(source, digest="ab")).key()

    before = {source: key(source) for source in ("books://primer", "lists://primer", "file:///x")}
    assert SOURCES.identity("lists") == "books:2"
    import dataclasses

    provided = SOURCES.outside["lists"]
    raised = dataclasses.replace(provided, declaration=dataclasses.replace(provided.declaration, version=3))
    SOURCES.outside["lists"] = raised
    assert {source for source in before if key(source) != before[source]} == {"lists://primer"}


def test_evaluation_items_come_from_it(tmp_path: Path) -> None:
    data = pin(DataSpec("books://novel", format="items"), tmp_path)
    blobs, counts = item_blobs(data, ["piqa"])
    assert counts == {"piqa": {"validation": 2}}
    assert b"tin opener" in blobs["piqa/validation.jsonl"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("books://poem", r"source 'books://poem': there is no book 'poem', only primer, novel.*g.yaml:6"),
        ("book://poem", r"source 'book://poem' is of no known kind.*g.yaml:6.*did you mean 'books'"),
        ("poem", r"source 'poem' is of no known kind.*write wheel://"),
    ],
)
def test_what_is_wrong_with_it_is_said_with_its_place(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(GridError) as caught:
        load(tmp_path, source)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_data_that_it_does_not_give_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"source 'lists://primer' gives no items data"):
        pin(DataSpec("lists://primer", format="items"), tmp_path)
