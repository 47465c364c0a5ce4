"""Items scored together: prepared tasks cut into chunks whose request schedule serves every model and intervention.

Tasks are rendered and tokenised once a job: the next checkpoint in the job, and the next suite, get the same requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.evaluate.encoding import Request
from jobs.evaluate.harness import Item, Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.prefix_tree import Schedule, cut, plan
from jobs.evaluate.results import BASE, Scored
from orchestrator.catalog.tasks import is_generative

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

# Items scored and stored together: few enough to lose little, many enough to share prefixes and fill batches.
CHUNK_ITEMS = 256
# The harness's own default, so that seed 0 draws the shots that everybody else's runs have.
SHOTS_SEED = 1234
# How many requests of a task are scored again one by one when the precision makes scores depend on the batch.
DEVIATION_REQUESTS = 32


class Chunk:
    """Some items of one task. The schedule of their requests is made when it is first needed, for all models."""

    def __init__(self, task: Prepared, items: Sequence[Item], number: int) -> None:
        self.task = task
        self.items = tuple(items)
        self.number = number
        self._schedule: Schedule | None = None

    @property
    def requests(self) -> list[Request]:
        """The items' requests in order."""
        return [request for item in self.items for request in item.requests]

    @property
    def name(self) -> str:
        """Task, number and what is asked: scores of other requests can never be taken for these."""
        asked = "\0".join(text for request in self.requests for text in request)
        return f"{self.task.name}-{self.number}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def answers(self, lm: PrefixLM) -> list[list[tuple[float, bool]]]:
        """Return (log-likelihood, is greedy) of every request, by item."""
        if self._schedule is None:
            self._schedule = lm.schedule(self.task.encodings(self.requests))
        scores = lm.score(self._schedule)
        flat = [(float(v), bool(g)) for v, g in zip(scores.loglikelihood, scores.greedy, strict=True)]
        grouped, at = [], 0
        for item in self.items:
            grouped.append(flat[at : at + len(item.requests)])
            at += len(item.requests)
        return grouped

    def scored(self, lm: PrefixLM) -> dict[str, Any]:
        """Return the answers, and their deviation, as JSON types; the schedule is given up.

        A whole benchmark's schedules would fill the memory.
        """
        answers = self.answers(lm)
        value = {"answers": answers, **self.deviation(answers, lm)}
        self._schedule = None
        return value

    def deviation(self, answers: Sequence[Sequence[tuple[float, bool]]], lm: PrefixLM) -> dict[str, float]:
        """Return the largest difference in nats between `answers` and those of a sample computed one by one.

        Nothing in fp32, where batching changes the last digits alone, nor after a task's first chunk.
        """
        if lm.exact or self.number:
            return {}
        requests = self.requests[:DEVIATION_REQUESTS]
        batched = [score for pairs in answers for score, _ in pairs][: len(requests)]
        fed = [cut(*pair, lm.max_length) for pair in self.task.encodings(requests)]
        alone = lm.score(plan(fed, share=False, rows=1))
        return {"deviation": float(np.abs(alone.loglikelihood - np.array(batched)).max())}


def prepare(
    context: StageContext, work: EvaluateWork, lm: PrefixLM, limit: int = 0, *, clean: bool = False
) -> list[Prepared]:
    """Return the tasks of `work` (or its `clean` twins) with their items; `limit` caps them besides their own limit.

    Tasks that generate keep room for their new tokens. A task that an earlier stage of the job has prepared in the same
    way is used again.
    """
    known: dict[object, Prepared] = context.job.live.setdefault("tasks", {})
    items = work.clean_items or work.items if clean else work.items
    tasks = []
    for spec in work.clean if clean else work.tasks:
        # Scored tasks of a suite of mixed ones are what they are without the others.
        room = lm.max_length - (work.new_tokens if work.benchmark or is_generative(spec.name) else 0)
        most = min(filter(None, (spec.limit, limit)), default=0)
        asked = (spec.name, spec.shots, most, items, work.tokenizer, room, work.shots, work.seed)
        if asked not in known:
            known[asked] = Prepared(
                spec,
                context.directory(items),
                limit=most,
                seed=SHOTS_SEED + work.seed,
                shared=work.shots == "shared",
                max_length=room,
                encode=lm.encode,
            )
        tasks.append(known[asked])
    return tasks


def chunks(task: Prepared) -> Iterator[Chunk]:
    """Yield the task's items in chunks, sub-tasks side by side, because they share their shots."""
    order = sorted(range(len(task.items)), key=lambda i: (task.group(task.items[i]), i))
    for number, at in enumerate(range(0, len(order), CHUNK_ITEMS)):
        yield Chunk(task, [task.items[i] for i in order[at : at + CHUNK_ITEMS]], number)


def outcomes(chunk: Chunk, answers: Sequence[Sequence[Sequence[Any]]], intervention: str = BASE) -> list[Scored]:
    """Return the scored items of a chunk from its answers (as stored in a ledger)."""
    return [
        Scored(
            chunk.task.name,
            item.id,
            item.gold,
            chunk.task.outcome(item, [(float(v), bool(g)) for v, g in pairs]),
            intervention,
        )
        for item, pairs in zip(chunk.items, answers, strict=True)
    ]


def deviations(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what a manifest says about scores that depend on their batch: nothing in fp32."""
    found = [value["deviation"] for value in values if "deviation" in value]
    return {"loglikelihood_deviation": max(found)} if found else {}


def task_info(tasks: Sequence[Prepared], work: EvaluateWork) -> dict[str, Any]:
    """Return the protocol of each task: version, shots asked for and used, items that had to do with fewer."""
    asked = {spec.name: spec.shots for spec in (*work.tasks, *work.clean)}
    protocol = {
        task.name: {
            "version": task.version,
            "shots_asked": asked[task.name],
            "shots": task.shots,
            "reduced_items": task.reduced,
        }
        for task in tasks
    }
    return {"tasks": protocol, "shots": work.shots, "precision": work.precision, "max_length": work.max_length}
