"""A tracker's SQLite file is whole or not there; a half-made one is put aside, one that holds runs stays."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.tracking import database
from tests.processes import ROOT

HEAD = "v3"


def write(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as opened, opened:
        for statement in statements:
            opened.execute(statement)


def half(path: Path, *more: str, version: str = "v1") -> None:
    """Make what a killed migration leaves."""
    tables = (
        "CREATE TABLE experiments (name)",
        "CREATE TABLE runs (run)",
        "CREATE TABLE alembic_version (version_num)",
    )
    write(path, *tables, f"INSERT INTO alembic_version VALUES ('{version}')", *more)


def whole(path: Path) -> None:
    half(path, "INSERT INTO experiments VALUES ('Default')", version=HEAD)


def rows(path: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as opened:
        return int(opened.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SETTLE_SECONDS", 0.0)


def aside(path: Path) -> list[Path]:
    return list(path.parent.glob("mlflow.db.half-made-*"))


@pytest.mark.parametrize("left", ["nothing", "empty", "no version", "old version", "journal"])
def test_what_was_left_half_made_is_made_anew(tmp_path: Path, left: str) -> None:
    path = tmp_path / "mlflow.db"
    if left == "empty":
        path.touch()
    elif left == "no version":
        write(path, "CREATE TABLE experiments (name)", "CREATE TABLE _alembic_tmp_runs (run)")
    elif left in ("old version", "journal"):
        half(path)
    if left == "journal":
        (tmp_path / "mlflow.db-journal").write_bytes(b"")
    database.prepare(path, whole, lambda: HEAD)
    assert rows(path, "experiments") == 1
    assert bool(aside(path)) == (left not in ("nothing", "empty")), "put aside, not deleted"
    assert not list(tmp_path.glob(".mlflow.db.new-*"))


@pytest.mark.parametrize(
    "held",
    [
        ["INSERT INTO runs VALUES ('mine')"],
        ["INSERT INTO experiments VALUES ('mine')"],
        ["CREATE TABLE registered_models (name)", "INSERT INTO registered_models VALUES ('mine')"],
    ],
)
def test_a_database_that_holds_something_is_never_touched(tmp_path: Path, held: list[str]) -> None:
    path = tmp_path / "mlflow.db"
    half(path, *held)
    before = path.read_bytes()
    database.prepare(path, whole, lambda: HEAD)
    assert path.read_bytes() == before
    path.write_bytes(b"this is no database" * 100)
    database.prepare(path, whole, lambda: HEAD)
    assert path.read_bytes().startswith(b"this is no database")
    assert not aside(path)


def test_a_finished_empty_database_stays(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    whole(path)
    before = path.stat().st_ino
    database.prepare(path, whole, lambda: HEAD)
    assert path.stat().st_ino == before


def test_a_database_that_somebody_makes_at_this_moment_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SETTLE_SECONDS", 5.0)
    path = tmp_path / "mlflow.db"
    half(path)

    def go_on() -> None:
        time.sleep(0.2)
        write(path, f"UPDATE alembic_version SET version_num = '{HEAD}'", "CREATE TABLE more (x)")

    other = threading.Thread(target=go_on)
    other.start()
    database.prepare(path, whole, lambda: HEAD)
    other.join()
    assert not aside(path)


def test_a_kill_while_it_is_made_leaves_no_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    program = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.tracking import database\n"
        "def make(path): path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "database.prepare(Path(sys.argv[1]), make, lambda: 'v3')"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    (stray,) = tmp_path.glob(".mlflow.db.new-*")
    os.utime(stray, (1.0, 1.0))
    database.prepare(path, whole, lambda: HEAD)
    assert rows(path, "experiments") == 1
    assert not stray.exists()


def test_the_experiments_that_have_something_to_show_are_found(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert database.experiments(path) == {}
    with contextlib.closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT)")
        rows = [(0, "Default", "active"), (1, "quickstart", "active"), (2, "old", "deleted")]
        made.executemany("INSERT INTO experiments VALUES (?, ?, ?)", rows)
        made.commit()
    assert database.experiments(path) == {"quickstart": "1"}
