"""The SQLite file of a tracker: it appears whole or not at all, and one that was left half-made is put aside.

MLflow makes its tables in some fifty migrations, each in its own transaction. A kill among them leaves a file that
no later start can use. What such a file can hold is nothing: runs come after the last migration.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

# A file that somebody else is making at this moment changes within this time.
SETTLE_SECONDS = 10.0
STRAY_SECONDS = 3600.0
# Tables whose rows somebody would miss.
_HOLDING = ("runs", "registered_models", "trace_info", "logged_models")
_BESIDE = ("", "-journal", "-wal", "-shm")


def prepare(path: Path, make: Callable[[Path], None], head: Callable[[], str]) -> None:
    """Make the database `path` unless a usable one is there; one that was left half-made is renamed and made anew.

    `make` fills a new file, `head` is the version that a finished one has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and _left_half_made(path, head):
        aside = path.with_name(f"{path.name}.half-made-{time.strftime('%y%m%d%H%M%S')}-{secrets.token_hex(2)}")
        for suffix in reversed(_BESIDE):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
        log.warning("%s was left half-made and holds nothing; it is %s now, and made anew", path, aside.name)
    if not path.exists() or not path.stat().st_size:
        _make(path, make)


def experiments(path: Path) -> dict[str, str]:
    """Return name -> id of the experiments that have runs to show; {} where the file is no such database."""
    query = "SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active' AND name <> 'Default'"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return {str(name): str(number) for name, number in database.execute(query)}
    except sqlite3.Error:
        return {}


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Fill a file under another name, then give it its own; of two that do so at once the first one's stays."""
    for stray in path.parent.glob(f".{path.name}.new-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stray.stat().st_mtime > STRAY_SECONDS:
                stray.unlink()
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        make(fresh)
        if path.exists() and not path.stat().st_size:
            os.replace(fresh, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)
    finally:
        for suffix in _BESIDE:
            Path(f"{fresh}{suffix}").unlink(missing_ok=True)


def _left_half_made(path: Path, head: Callable[[], str]) -> bool:
    """Whether the file holds nothing and has another version than a finished one, and nobody is at it."""
    if _holds_something(path) or _version(path) == head():
        return False
    end = time.monotonic() + SETTLE_SECONDS
    before = _stamp(path)
    while time.monotonic() < end:
        time.sleep(min(0.5, SETTLE_SECONDS))
        if _stamp(path) != before:
            return False  # whoever makes it will end; a tracker that is not ready yet is asked again
    return True


def _stamp(path: Path) -> tuple[tuple[int, int], ...]:
    found = []
    for suffix in _BESIDE:
        with contextlib.suppress(OSError):
            status = os.stat(f"{path}{suffix}")
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


def _holds_something(path: Path) -> bool:
    """Whether there are rows that somebody would miss; true also for what is no database at all."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if any(database.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in _HOLDING if name in tables):
                return True
            named = "SELECT 1 FROM experiments WHERE name != 'Default' LIMIT 1"
            return "experiments" in tables and database.execute(named).fetchone() is not None
    except sqlite3.Error:
        return True


def _version(path: Path) -> str:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return ""
    return str(found[0]) if found else ""
