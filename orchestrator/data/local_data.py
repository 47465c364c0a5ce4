"""The head of every local data file, read when a grid is loaded: what the node could not read is refused before that.

Also how many rows a source trains on, where the plan can know it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import islice

from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.pins import WHEELS
from orchestrator.catalog.tasks import splits_of, splits_read
from orchestrator.data.benchmark_files import read_labels
from orchestrator.data.item_files import checked, read_items
from orchestrator.data.layouts import conversation, exchange, field_text, labelled
from orchestrator.data.pictured import vision_texts
from orchestrator.data.rows import Row, data_files, local_path, read_file
from orchestrator.errors import SourceError
from orchestrator.files.problems import Mistake
from orchestrator.spec.cell import DataSpec, JudgeSpec, TaskSpec
from orchestrator.spec.content import examples_of

# Rows of each file that a plan looks at.
HEAD = 200
# Tasks whose shots come from the item's own group.
_GROUPED = frozenset({"mmlu", "blimp"})


def identifier(*texts: str) -> str:
    """Return the name of a document or example: rows of equal text are one."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def texts_of(row: Row, data: DataSpec, where: str) -> tuple[str, ...]:
    """Return a row's document, the pieces of its conversation, or its prompt and the response as it follows that."""
    if data.format == "text":
        return (field_text(row, data.text_field, where),)
    if data.format == "chat":
        return conversation(row, data, where)
    if data.format == "vision":
        return vision_texts(row, data, where)
    prompt, response = exchange(row, data, where)
    return prompt, joined(prompt, response)


def joined(prompt: str, response: str) -> str:
    """Return the response as it follows the prompt: with a space before it unless one of them brings white space."""
    return response if response[:1].isspace() or prompt[-1:].isspace() else f" {response}"


def file_rows(data: DataSpec) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a `file://` source."""
    for file in data_files(local_path(data.source), data.format):
        yield from labelled(read_file(file, data.text_field), data)


def held_out(rows: int, holdout: float) -> int:
    """Return how many of `rows` documents or examples are held out."""
    return math.ceil(holdout * rows) if holdout else 0


def known_rows(data: DataSpec) -> int | None:
    """Return how many different rows a source gives (at most `data.rows`), None where only the node can tell."""
    if data.source.startswith("file://") and data.digest:
        seen: set[str] = set()
        for where, row in file_rows(data):
            seen.add(identifier(*texts_of(row, data, where)))
            if len(seen) == data.rows:
                break
        return len(seen)
    for wheel in WHEELS.values():
        part = data.source.removeprefix(f"{wheel.url}/")
        if part in wheel.rows and data.rows:
            return min(wheel.rows[part], data.rows)
    return None


def training_examples(data: DataSpec) -> int:
    """Return how many examples of instruction data an epoch trains on: without held-out rows, with mixed-in ones.

    Raises Mistake for text, and where neither the source nor `data.rows` says it; SourceError for a file that cannot
    be read.
    """
    if data.format == "vision":
        raise Mistake("counts examples, and how many a vision set gives is known when it is read", "write steps")
    if data.format == "text":
        raise Mistake(
            "counts windows of text, and how many there are is known when it is tokenized",
            "write tokens or sequences, such as 3.5M tokens",
        )
    rows = known_rows(data)
    if rows is None:
        rows = data.rows
    if rows < 1:
        raise Mistake("needs to know how many rows the data has", "set data.rows")
    return rows - held_out(rows, data.holdout) + data.mix.rows


def head_findings(data: DataSpec) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) of the text or instruction data in a local file or folder."""
    if not data.source.startswith("file://") or not data.digest:
        return
    try:
        seen: set[str] = set()
        whole = True
        for file in data_files(local_path(data.source), data.format):
            rows = labelled(read_file(file, data.text_field), data)
            for where, row in islice(rows, HEAD):
                seen.add(identifier(*texts_of(row, data, where)))
            whole = whole and next(rows, None) is None
        if not whole:
            return
        rows_kept = min(len(seen), data.rows or len(seen))
        if not seen:
            yield f"{data.source} has no rows", "write one JSON object a line, or name another file"
        elif held_out(rows_kept, data.holdout) >= rows_kept:
            message = f"{data.source} leaves no training rows: {rows_kept} of {rows_kept} are held out"
            yield message, "lower data.holdout or add rows"
    except (SourceError, OSError) as error:
        yield told(error)


def mix_findings(data: DataSpec) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) of the examples to be mixed in from a local file: too few, or not to be read."""
    source = examples_of(data.mix)
    if not data.mix.rows or not source.source.startswith("file://") or not source.digest:
        return
    found = list(head_findings(source))
    yield from found
    if not found:
        try:
            rows = known_rows(source) or 0
        except (SourceError, OSError) as error:
            yield told(error)
            return
        if rows < data.mix.rows:
            yield f"{source.source} has {rows} different examples, not {data.mix.rows}", "lower data.mix.rows"


def items_findings(source: str, task: TaskSpec) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) of a task's items in a local folder or zip file."""
    try:
        splits = read_items(local_path(source), task.name)
        read = splits_read(task.name, splits)
        counts = {split: _count(checked(task.name, islice(splits[split], HEAD))) for split in read}
        for split, count in counts.items():
            if not count:
                yield f"{source} has no items of task {task.name!r}, split {split!r}", "write one JSON object a line"
                return
    except (SourceError, OSError) as error:
        yield told(error)
        return
    evaluated, *pools = read
    if task.shots and not set(splits) - {evaluated}:
        wanted = " or ".join((splits_of(task.name) or ("", "train"))[1:]) or "another split"
        yield (
            f"{source} has no split to draw {task.shots} shots of task {task.name!r} from",
            f"add {wanted}, or shots: 0",
        )
    # The harness draws one more where it has to leave the item itself out.
    needed = task.shots + (evaluated != "test")
    if task.shots and pools and task.name not in _GROUPED and counts[pools[0]] < min(needed, HEAD):
        message = f"{source}: {counts[pools[0]]} rows of task {task.name!r}, split {pools[0]!r}, are too few for "
        yield message + f"{task.shots} shots", f"it needs {needed} rows, or fewer shots"


def labels_findings(judge: JudgeSpec) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, hint) of a person's labels in a local file."""
    if judge.digest and judge.source.startswith("file://") and JUDGES.get(judge.name).source == "file":
        try:
            read_labels(local_path(judge.source))
        except (SourceError, OSError) as error:
            yield told(error)


def told(error: SourceError | OSError) -> tuple[str, str]:
    """Return what an error of a source says, and its remedy."""
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read ({error.strerror or error})", "check the disk that it lies on"
    return error.error + (f" ({error.cause})" if error.cause else ""), error.hint


def _count(rows: Iterable[Row]) -> int:
    return sum(1 for _ in rows)
