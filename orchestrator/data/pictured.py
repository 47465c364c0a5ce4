"""Rows with pictures: their questions and answers, and what their column of pictures holds.

The plan and the node read rows with this; only the node decodes the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from orchestrator.data.layouts import field_text, turns_of
from orchestrator.data.rows import local_path
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec

# Columns of pictures by the names that public sets give them.
COLUMNS = ("images", "image")
# Where a public set says in a question that the picture goes: it goes before the question here.
_PLACEHOLDER = "<image>"
_TURNS = ("messages", "conversations")


def exchanges(row: Mapping[str, object], data: DataSpec, where: str) -> list[tuple[str, str]]:
    """Return the questions and answers of a row about pictures, in order.

    A conversation gives one for each answer; a row with columns has one: `prompt` (or data.prompt_field), and
    `response` (or data.response_field), `answer`, or the one of `choices` that `label` says. SourceError when there is
    none.
    """
    if data.turns_field or any(isinstance(row.get(name), list | tuple) for name in _TURNS):
        turns = turns_of(row, data, where)
        pairs = [
            (asked, said)
            for (first, asked), (second, said) in pairwise(turns)
            if (first, second) == ("user", "assistant")
        ]
        if not pairs:
            raise SourceError(f"{where}: its conversation has no answer", hint="choose another split, or leave it out")
        return [(_plain(asked), said) for asked, said in pairs]
    return [(_plain(field_text(row, data.prompt_field, where)), _answer(row, data, where))]


def values_of(row: Mapping[str, object], data: DataSpec, where: str) -> list[object]:
    """Return what the row's column of pictures holds: encoded bytes, a path, or a mapping with one of these.

    An empty list where the row says that it has none; SourceError where it has no such column.
    """
    name = data.images_field or next((name for name in COLUMNS if name in row), "")
    if not name or name not in row:
        raise SourceError(
            f"{where} has no column {name or 'images'!r}",
            cause=f"its columns are {', '.join(map(str, row))}",
            hint="set data.images_field to the column of its pictures",
        )
    value = row[name]
    if value is None:
        return []
    found = [*value] if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    for one in found:
        if not isinstance(one, str | bytes | Mapping):
            hint = "a picture is encoded bytes (PNG, JPEG), or its path in the source's folder"
            raise SourceError(f"{where}: its picture is {type(one).__name__}", hint=hint)
    return found


def picture_path(value: str, source: str, where: str) -> Path:
    """Return the file of a picture that a row names by its path below the folder that is the source.

    SourceError when the source is no folder (its pictures would not be in its digest), or the path leads out of it.
    """
    if not source.startswith("file://"):
        cause = f"{value[:80]!r}, where the bytes of a picture should be"
        raise SourceError(f"{where} names its picture by a path", cause=cause, hint="fetch the set, and use file://")
    root = local_path(source)
    if not root.is_dir():
        hint = "make the folder that holds the rows and the pictures the source: both are then in its digest"
        raise SourceError(f"{where} names its picture by a path, and {source} is a file", cause=value[:80], hint=hint)
    try:
        path = (root / value).resolve()
        inside = path.is_relative_to(root.resolve())
        there = path.is_file()
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: {value[:80]!r} is no path", cause=str(error), hint="correct the row") from None
    if not inside:
        raise SourceError(
            f"{where}: its picture {value[:80]!r} lies outside of {root}", hint="pictures lie in the source's folder"
        )
    if not there:
        raise SourceError(f"{where}: its picture {value[:80]!r} does not exist", cause=f"looked for {path}")
    return path


def vision_texts(row: Mapping[str, object], data: DataSpec, where: str) -> tuple[str, ...]:
    """Return the texts of a row about pictures and what names these; SourceError when one is not there."""
    named = []
    for value in values_of(row, data, where):
        path = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
        if isinstance(path, str):
            picture_path(path, data.source, where)
            named.append(path)
    return (*(text for pair in exchanges(row, data, where) for text in pair), *named)


def _plain(prompt: str) -> str:
    return prompt.replace(_PLACEHOLDER, "").strip("\n")


def _answer(row: Mapping[str, object], data: DataSpec, where: str) -> str:
    if data.response_field != "response" or "response" in row:
        return field_text(row, data.response_field, where)
    choices, label = row.get("choices"), row.get("label")
    if "answer" not in row and isinstance(choices, list | tuple) and isinstance(label, int):
        if not 0 <= label < len(choices):
            raise SourceError(f"{where}: label {label} is none of its {len(choices)} choices", hint="correct the row")
        return str(choices[label])
    return field_text(row, "answer" if "answer" in row else "response", where)
