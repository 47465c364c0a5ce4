"""Results read from Python: the rows of `moegrid table`, from a store in which nothing is made or changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.api import open_store
from orchestrator.errors import StoreError
from orchestrator.store import Store
from tests.grid_store import GridStore


def test_a_store_that_is_read_stays_as_it_is(tmp_path: Path) -> None:
    grid = GridStore(Store.open(str(tmp_path / "runs")), settings=("none", "router"), seeds=(0, 1))
    grid.commit_all()
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("*"))}
    opened = open_store(str(tmp_path / "runs"))
    rows = opened.results("demo")
    assert opened.grids() == ["demo"]
    assert [(row["freeze"], row["seed"], row["state"]) for row in rows] == [
        ("none", 0, "done"),
        ("none", 1, "done"),
        ("router", 0, "done"),
        ("router", 1, "done"),
    ]
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("*"))} == before


def test_a_store_that_does_not_exist_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(str(tmp_path / "nope"))
    assert not (tmp_path / "nope").exists()
