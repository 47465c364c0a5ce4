"""The suite `lmms_eval`: answers to lmms-eval's benchmarks, generated behind pictures and scored by its own functions.

Prompts, generation settings, filters, scores and their means are those of the pinned wheel's YAML; a set of
`evaluate.pictures` with `protocol: lmms_eval` names tasks and rows. A row shows one picture: those with several are
left out and counted; scores that ask a model behind an API are not made. `responses.parquet` holds every answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.data.images import BLOB, load_images, opened, pixels
from jobs.data.images import encoded as as_png
from jobs.data.tokenizer import Vocabulary
from jobs.evaluate.generation import Generation, generate
from jobs.evaluate.judging.responses import responses_parquet
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.lmms_tasks import Benchmark, benchmark
from jobs.evaluate.scoring import Model, batch_tokens
from jobs.evaluate.state import State, load_state
from jobs.probe.metrics import in_range
from orchestrator.data.rows import Row
from orchestrator.errors import MoegridError, SourceError

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

# Rows whose answers are stored together.
ROWS_A_PART = 16


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a task: as lmms-eval reads it, its question, and its picture as PNG."""

    number: int
    doc: Row
    prompt: str
    picture: bytes


def run(context: StageContext, work: EvaluateWork) -> None:
    """Generate the answers to every row, score them, and commit `responses.parquet`."""
    state = load_state(context, work)
    known = load_images(context.fetch(work.items, BLOB))
    writer = _Writer(state, work)
    ledger = Ledger(context)
    metrics: dict[str, float] = {}
    told: dict[str, dict[str, object]] = {}
    texts: list[dict[str, object]] = []
    for spec in work.tasks:
        task = benchmark(spec.name)
        rows = list(_rows(context, work, task, known, spec.limit))
        asked = [row for row in rows if row is not None]
        if not asked:
            raise SourceError(f"no row of {spec.name!r} shows one picture", hint="correct the set's source or tasks")
        parts = [asked[at : at + ROWS_A_PART] for at in range(0, len(asked), ROWS_A_PART)]
        values = ledger.scored(
            [(_name(work, spec.name, part), partial(writer.answers, context, task, part)) for part in parts],
            partial(_tell, context, len(parts)),
        )
        answers = [answer for value in values for answer in value]
        scores = task.scored([row.doc for row in asked], answers)
        metrics |= {
            f"{work.benchmark}/{spec.name}/{name}": in_range(name, value, 0.0) for name, value in scores.items()
        }
        told[spec.name] = {
            "rows": len(asked),
            "several_pictures": len(rows) - len(asked),
            "judged": [*task.task.judged],
        }
        texts += [
            {"task": spec.name, "item": str(row.number), "label": "", "prompt": row.prompt, "response": answer}
            for row, answer in zip(asked, answers, strict=True)
        ]
    ledger.commit(work, blobs={"responses.parquet": responses_parquet(texts)}, metrics=metrics, info={"tasks": told})


def _tell(context: StageContext, of: int, done: int) -> None:
    context.progress(done, of)


class _Writer:
    """Writes answers behind pictures with one state."""

    def __init__(self, state: State, work: EvaluateWork) -> None:
        if work.model.vision is None:
            raise MoegridError("a model that reads text alone cannot be asked about pictures", hint="set model.vision")
        self._model, self._tokenizer = Model(state.model, state.spans), state.tokenizer
        self._vocabulary = Vocabulary.load(state.tokenizer_directory)
        self._size, self._longest = work.model.vision.image_size, work.max_length

    @torch.inference_mode()
    def answers(self, context: StageContext, task: Benchmark, rows: Sequence[_Row]) -> list[str]:
        """Return an answer to each row."""
        model, device = self._model.module, self._model.device
        shown = np.stack([pixels(row.picture, self._size) for row in rows])
        features = model.vision.encoder(torch.from_numpy(shown).to(device))[0]  # type: ignore[union-attr,operator]
        end = self._tokenizer.decode([self._tokenizer.eos_token_id])
        asked = Generation.of(task.generation, end, self._longest // 2)
        new = min(asked.new_tokens, self._longest // 2)
        settings = Generation(asked.stops, new, asked.temperature, asked.seed)
        found = []
        for picture, row in zip(features, rows, strict=True):
            context.check()
            ((prompt, _),) = self._vocabulary.encode_pairs([row.prompt], [""])
            request = prompt[-(self._longest - new) :], settings
            tokens = batch_tokens(len(self._tokenizer), device)
            found += generate(self._model, self._tokenizer, [request], tokens, picture.unsqueeze(0))
        return found


def _rows(
    context: StageContext, work: EvaluateWork, task: Benchmark, known: Mapping[str, bytes], limit: int
) -> Iterator[_Row | None]:
    """Yield the rows of a task, None for one that shows several pictures."""
    name = f"{task.task.name}/{task.split}.jsonl"
    try:
        lines = context.fetch(work.items, name).read_text().splitlines()
    except KeyError:
        hint = f"lmms-eval asks its split {task.split!r}: name the file {name}"
        raise SourceError(f"there is no {name}", hint=hint) from None
    items = [json.loads(line) for line in lines if line]
    for number, item in enumerate(items[:limit] if limit else items):
        doc = {key: _decoded(value, known, f"{name}, row {number}") for key, value in item.items()}
        pictures = task.pictures(doc)
        if len(pictures) != 1:
            yield None
            continue
        yield _Row(number, doc, task.text(doc), as_png(pictures[0].convert("RGB")))


def _decoded(value: object, known: Mapping[str, bytes], where: str) -> object:
    """Return a value of a row, with a picture in the place of its digest."""
    if isinstance(value, str) and value in known:
        return opened(known[value], where)
    return value


def _name(work: EvaluateWork, task: str, rows: Sequence[_Row]) -> str:
    """Return set, task, number and what is asked: answers to other questions can never be taken for these."""
    asked = hashlib.sha256(b"\0".join(part for row in rows for part in (row.prompt.encode(), row.picture)))
    return f"{work.benchmark}-{task}-{rows[0].number}-{asked.hexdigest()[:12]}"
