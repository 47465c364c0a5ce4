"""Pictures of data files and hub sets: read out of their columns, looked at once, known by digest from then on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jobs.data.corpora import VisionExample
from jobs.data.images import PICTURE_BYTES, digest_of, opened
from orchestrator.data.local_data import identifier, joined
from orchestrator.data.pictured import COLUMNS, exchanges, picture_path, values_of
from orchestrator.data.rows import Row
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec

# What a row may say of itself, beyond question, answer and pictures.
_LABELS = ("group", "identity", "subtask")


def vision_rows(data: DataSpec, rows: Iterable[tuple[str, Row]], images: dict[str, bytes]) -> list[VisionExample]:
    """Return the examples of rows about pictures, each once; the pictures go into `images` by digest.

    SourceError for a row without question, answer or column of pictures, and for a picture that cannot be decoded.
    """
    found: dict[str, VisionExample] = {}
    for where, row in rows:
        digests = tuple(kept(value, data.source, where, images) for value in values_of(row, data, where))
        group, identity, subtask = (str(row[name]) if row.get(name) else "" for name in _LABELS)
        for prompt, answer in exchanges(row, data, where):
            response = joined(prompt, answer)
            name = identifier(prompt, response, *digests)
            found.setdefault(
                name, VisionExample(name, data.source, prompt, response, digests, group, identity, subtask)
            )
    return list(found.values())


def kept(value: object, source: str, where: str, images: dict[str, bytes]) -> str:
    """Return the digest of a picture in a row, which goes into `images`; SourceError when it cannot be decoded."""
    data = _bytes_of(value, source, where)
    digest = digest_of(data)
    if digest not in images:
        opened(data, where)
        images[digest] = data
    return digest


def by_digest(row: Row, source: str, where: str, images: dict[str, bytes]) -> dict[str, object]:
    """Return an evaluation item with its pictures as digests; they go into `images`.

    Encoded bytes in any column are a picture. Where no column holds any, a path in the columns `images` and `image` is
    one: beside bytes it is the name that the picture had elsewhere (MathVista).
    """
    beside = any(_is_picture(False, one) for value in row.values() for one in _each(value))
    named: tuple[str, ...] = () if beside else COLUMNS
    return {name: _replaced(name in named, value, source, where, images) for name, value in row.items()}


def _each(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)


def _replaced(named: bool, value: object, source: str, where: str, images: dict[str, bytes]) -> object:
    if isinstance(value, list | tuple) and value and all(_is_picture(named, one) for one in value):
        return [kept(one, source, where, images) for one in value]
    return kept(value, source, where, images) if _is_picture(named, value) else value


def _is_picture(named: bool, value: object) -> bool:
    if isinstance(value, str):
        return named
    return isinstance(value, bytes) or (isinstance(value, Mapping) and set(value) == {"bytes", "path"})


def _bytes_of(value: object, source: str, where: str) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        path = picture_path(value, source, where)
        return _read(path, where)
    if isinstance(value, bytes):
        return value
    hint = "give it bytes or a path, or leave the row out"
    raise SourceError(f"{where}: its picture is {type(value).__name__}", hint=hint)


def _read(path: Path, where: str) -> bytes:
    if path.stat().st_size > PICTURE_BYTES:
        cause = f"{path}, {path.stat().st_size / 2**20:.0f} MiB, at most {PICTURE_BYTES / 2**20:g} are read"
        raise SourceError(f"{where}: its picture is too large", cause=cause, hint="store it smaller")
    with path.open("rb") as file:
        return file.read()
