"""Evaluation items in a user's folder or zip file: `<task>/<split>.jsonl`, checked row by row.

The plan reads the head of every split with this, the node the whole of it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from orchestrator.catalog.tasks import splits_of, splits_read
from orchestrator.data.answers import check
from orchestrator.data.rows import FORMATS, Row, json_rows, placed, read_file
from orchestrator.errors import SourceError

_Open = Callable[[], BinaryIO]


def read_items(path: Path, task: str) -> dict[str, Iterator[tuple[str, Row]]]:
    """Return (where, row) of the splits of `task` in a folder or zip file, still to be read.

    One file of rows, or `<task>.jsonl`, is the split that is evaluated. A folder or zip file that is named after the
    task and has neither holds its sub-tasks, one file each (`blimp.zip`).
    """
    known = splits_of(task)
    evaluated = known[0] if known else "train"
    if path.suffix in FORMATS and path.is_file() and not zipfile.is_zipfile(path):
        return {evaluated: read_file(path)}
    contents = _files(path)
    mine = {name: opened for name, opened in contents.items() if _belongs(name, task)}
    apart = {name for name in mine if PurePosixPath(name).parent.name == task}
    splits: dict[str, list[tuple[str, _Open]]] = {}
    for name, opened in sorted((mine or (contents if path.stem == task else {})).items()):
        split = PurePosixPath(name).stem if name in apart else "train" if apart else evaluated
        splits.setdefault(split, []).append((f"{path}/{name}", opened))
    hint = f"it needs {task}/<split>.jsonl or {task}.jsonl"
    if not splits:
        raise SourceError(f"{path} has no items of task {task!r}", hint=hint)
    if known and evaluated not in splits:
        cause = f"it has {', '.join(f'{task}/{split}.jsonl' for split in splits)}"
        raise SourceError(f"{path} has no {task}/{evaluated}.jsonl: that split is evaluated", cause=cause, hint=hint)
    return {split: _rows(files) for split, files in splits.items()}


def checked(task: str, rows: Iterable[tuple[str, Row]]) -> Iterator[Row]:
    """Yield the rows of a split that the task reads; SourceError with the row that cannot be evaluated."""
    for where, row in rows:
        check(task, row, where)
        yield row


def read_splits(task: str, splits: Mapping[str, Iterable[tuple[str, Row]]]) -> dict[str, list[dict[str, Any]]]:
    """Return all rows by split; those of the splits that the task reads are checked."""
    read = splits_read(task, splits)
    return {
        split: [dict(row) for row in (checked(task, rows) if split in read else (row for _, row in rows))]
        for split, rows in splits.items()
    }


def _rows(files: Iterable[tuple[str, _Open]]) -> Iterator[tuple[str, Row]]:
    for name, opened in files:
        try:
            with opened() as lines:
                yield from placed(name, json_rows(lines, name))
        except (FileNotFoundError, PermissionError, zipfile.BadZipFile, zlib.error) as error:
            raise SourceError(f"{name} cannot be read", cause=str(error)) from None


def _files(path: Path) -> dict[str, _Open]:
    """Return the JSON-lines files of a folder or zip file, to be opened, by their path inside it."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): _opener(p) for p in path.rglob("*.jsonl") if p.is_file()}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {name: _member(path, name) for name in archive.namelist() if name.endswith(".jsonl")}
    raise SourceError(f"{path} is neither a folder nor a zip file", hint="evaluation items are <task>/<split>.jsonl")


def _opener(path: Path) -> _Open:
    return lambda: path.open("rb")


def _member(path: Path, name: str) -> _Open:
    # The archive closes with its member.
    return lambda: cast(BinaryIO, zipfile.ZipFile(path).open(name))


def _belongs(name: str, task: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".jsonl" and (path.parent.name == task or path.stem == task)
