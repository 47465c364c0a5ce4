"""Rows of data files: JSON lines, JSON lists, Parquet and text; whatever is wrong is told with file and line.

The plan reads a file's head with this, the node the whole of it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import SourceError

Row = Mapping[str, Any]
FORMATS = (".jsonl", ".json", ".parquet", ".tsv", ".txt", ".md")
_BATCH = 256


def local_path(source: str) -> Path:
    """Return the file or folder that `file://PATH` names; SourceError when it does not exist."""
    path = Path(source.removeprefix("file://")).expanduser()
    if not path.exists():
        raise SourceError(f"{source} does not exist", hint="file:// takes an absolute path, or one from where you run")
    return path


def data_files(path: Path, form: str = "") -> list[Path]:
    """Return the file itself, or the files of a folder by name; of `vision` data those that can hold rows."""
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file())
    return [p for p in files if p.suffix in FORMATS] if form == "vision" else files


def read_file(path: Path, text_field: str = "text") -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a Parquet, JSON-lines, JSON (a list of objects), TSV or text file (one document)."""
    try:
        if path.suffix == ".parquet":
            yield from placed(str(path), _parquet_rows(path))
        elif path.suffix in (".jsonl", ".json"):
            with path.open("rb") as file:
                yield from placed(str(path), json_rows(file, str(path)))
        elif path.suffix == ".tsv":
            with path.open(encoding="utf-8", newline="") as lines:
                yield from placed(str(path), csv.DictReader(lines, delimiter="\t"))
        elif path.suffix in (".txt", ".md"):
            yield str(path), {text_field: path.read_text(encoding="utf-8")}
        else:
            raise SourceError(f"{path} has an unknown format", hint=f"use {', '.join(FORMATS)}")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text", cause=str(error), hint="save it as UTF-8") from None
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read", cause=error.strerror or str(error), hint="check its rights"
        ) from None


def placed(name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of rows that are told by their number."""
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    """Yield the objects of JSON lines, or of one JSON list; SourceError with the line that is none."""
    begun = False
    number = 0
    remaining = iter(lines)
    for piece in remaining:
        if not begun and piece.lstrip()[:1] == b"[":
            yield from _json_list(b"".join([piece, *remaining]), name)
            return
        # Universal newlines: a lone carriage return ends a line too.
        for line in piece.splitlines() or [b""]:
            number += 1
            if line.strip():
                begun = True
                yield _object(_parsed(line, f"{name}:{number}"), f"{name}:{number}")


def _json_list(data: bytes, name: str) -> Iterator[Row]:
    for number, value in enumerate(_parsed(data, name), 1):
        yield _object(value, f"{name}, row {number}")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not JSON", cause=str(error), hint="write one JSON object a line") from None


def _object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        hint = "write one JSON object a line, with a key for each column"
        raise SourceError(f"{where} is {type(value).__name__}, not an object", hint=hint)
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise SourceError(f"{path} is not a Parquet file", cause=str(error), hint="write it anew") from None
