"""A few rows of a data set, for a person: `python -m jobs.data.show`, one JSON question on stdin, one answer on stdout.

Question: `data` (the fields of a DataSpec), `rows` (of each kind), `seed`, `tasks` (of items; [] = all that the package
has). Answer: `groups`, each with its name, how many rows it has, and some of them that the seed draws; `images`,
pictures by digest, as data addresses.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, TypeVar

from jobs.data.corpora import Conversation, Document, VisionExample
from jobs.data.images import BLOB, encoded, load_images, opened
from jobs.data.item_files import item_blobs
from jobs.data.stage import AnyRow, read_rows, split_rows
from orchestrator.catalog.pictures import VISION_TASKS
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.cell import DataSpec

# What a page shows of one text, and of one picture that it does not hold as it came.
SHOWN_CHARACTERS = 1200
_THUMBNAIL = 256
_AS_IT_CAME = 64 * 2**10
# Tasks of a source that says none: of the pinned wheel.
_WHEEL_TASKS = ("arc_easy", "hellaswag", "piqa")
T = TypeVar("T")


class Shown(TypedDict):
    """One row: texts by what they are, the digests of its pictures, and marks such as its split."""

    texts: dict[str, str]
    images: list[str]
    marks: list[str]


class Group(TypedDict):
    """Rows of one kind."""

    name: str
    count: int
    rows: list[Shown]


def main() -> int:
    """Answer one question; errors go to stderr, and their exit code is returned."""
    question = json.load(sys.stdin)
    try:
        data = DataSpec(**question["data"])
        images: dict[str, bytes] = {}
        count, seed = int(question["rows"]), int(question["seed"])
        if data.format == "items":
            groups = item_groups(data, question["tasks"], count, seed, images)
        else:
            groups = row_groups(data, count, seed, images)
    except MoegridError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    needed = {name for group in groups for row in group["rows"] for name in row["images"]}
    json.dump({"groups": groups, "images": {name: address(images[name]) for name in sorted(needed)}}, sys.stdout)
    return 0


def row_groups(data: DataSpec, count: int, seed: int, images: dict[str, bytes]) -> list[Group]:
    """Return training data by subtask (or as one group), each row with the split that it falls into."""
    every = read_rows(data, seed=seed, images=images)
    train, heldout = split_rows(every, data if len(every) > 1 else replace(data, holdout=0.0), seed)
    found: dict[str, list[tuple[AnyRow, str]]] = {}
    for rows, split in ((train, ""), (heldout, "held out")):
        for row in rows:
            kind = row.subtask if isinstance(row, VisionExample) and row.subtask else data.format
            found.setdefault(kind, []).append((row, split))
    return [
        {"name": name, "count": len(rows), "rows": [_row(row, split) for row, split in _drawn(rows, count, seed)]}
        for name, rows in found.items()
    ]


def item_groups(data: DataSpec, tasks: Sequence[str], count: int, seed: int, images: dict[str, bytes]) -> list[Group]:
    """Return evaluation items by task and split. Of a package without `tasks`: all that it can answer."""
    packaged = data.source.startswith(("npm://", "deb://"))
    groups: list[Group] = []
    for task in tasks or (VISION_TASKS if packaged else _WHEEL_TASKS):
        try:
            blobs, counts = item_blobs(data, [task])
        except SourceError:
            if tasks or not packaged:
                raise
            continue
        images |= _pictures(blobs.get(BLOB))
        for split, total in counts[task].items():
            lines = blobs[f"{task}/{split}.jsonl"].splitlines()
            rows = [_item(json.loads(line)) for line, _ in _drawn([(line, "") for line in lines if line], count, seed)]
            groups.append({"name": f"{task} ({split})", "count": total, "rows": rows})
    return groups


def address(data: bytes) -> str:
    """Return a picture as a data address: as it came where it is small, else smaller."""
    form = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    if len(data) > _AS_IT_CAME:
        image = opened(data, "a picture")
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        data, form = encoded(image), "png"
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def _drawn(rows: Sequence[tuple[T, str]], count: int, seed: int) -> list[tuple[T, str]]:
    def rank(number: int) -> str:
        return hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()

    return [rows[number] for number in sorted(sorted(range(len(rows)), key=rank)[:count])]


def _row(row: AnyRow, split: str) -> Shown:
    if isinstance(row, Document):
        texts = {"text": row.text}
    elif isinstance(row, Conversation):
        texts = {f"{'answer' if number % 2 else 'context'} {number // 2 + 1}": p for number, p in enumerate(row.pieces)}
    else:
        texts = {"prompt": row.prompt, "response": row.response}
    marks = [split, *((row.group, row.identity) if isinstance(row, VisionExample) else ())]
    images = list(row.images) if isinstance(row, VisionExample) else []
    return _cut(texts, images, [mark for mark in (row.source, *marks) if mark])


def _item(item: Mapping[str, object]) -> Shown:
    images = item.get("images", item.get("image"))
    digests = [str(one) for one in (images if isinstance(images, list) else [images]) if one]
    marks = [str(item[name]) for name in ("group", "identity") if item.get(name)]
    skipped = ("id", "images", "image", "group", "identity", "subtask", "label")
    texts = {name: _text(value) for name, value in item.items() if name not in skipped or not digests}
    return _cut(texts, digests, marks)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(texts: Mapping[str, str], images: list[str], marks: list[str]) -> Shown:
    long = SHOWN_CHARACTERS
    shown = {name: text if len(text) <= long else f"{text[:long]} ... ({len(text):,})" for name, text in texts.items()}
    return {"texts": shown, "images": images, "marks": marks}


def _pictures(blob: bytes | None) -> dict[str, bytes]:
    return load_images(io.BytesIO(blob)) if blob else {}


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # pyarrow's threads may still be starting, and would abort a process that tidies up (25.0.1, on a busy machine).
    os._exit(code)
