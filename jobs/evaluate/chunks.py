"""Items scored together: prepared tasks cut into chunks whose request schedule serves every model and intervention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluate.harness import Item, Prepared
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.prefix_tree import Schedule
from jobs.evaluate.results import BASE, Scored

if TYPE_CHECKING:
    from orchestrator.spec.work import EvaluateWork

# Items scored and stored together: few enough to lose little, many enough to share prefixes and fill batches.
CHUNK_ITEMS = 256
# The harness's own default, so that seed 0 draws the shots that everybody else's runs have.
SHOTS_SEED = 1234


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some items of one task with the schedule of their requests, made once for all models and interventions."""

    name: str
    task: Prepared
    items: tuple[Item, ...]
    schedule: Schedule

    def answers(self, lm: PrefixLM) -> list[list[tuple[float, bool]]]:
        """Return (log-likelihood, is greedy) of every request, by item."""
        scores = lm.score(self.schedule)
        flat = [(float(v), bool(g)) for v, g in zip(scores.loglikelihood, scores.greedy, strict=True)]
        grouped, at = [], 0
        for item in self.items:
            grouped.append(flat[at : at + len(item.requests)])
            at += len(item.requests)
        return grouped


def prepare(work: EvaluateWork, items: Path, lm: PrefixLM, limit: int = 0) -> list[Prepared]:
    """Return the tasks of `work` with their items; `limit` caps the items of each task besides its own limit."""
    return [
        Prepared(
            spec,
            items,
            limit=min(filter(None, (spec.limit, limit)), default=0),
            seed=SHOTS_SEED + work.seed,
            shared=work.shots == "shared",
            max_length=lm.max_length,
            lengths=lambda pairs: [len(context) + len(rest) - 1 for context, rest in lm.encode(pairs)],
        )
        for spec in work.tasks
    ]


def chunks(task: Prepared, lm: PrefixLM) -> Iterator[Chunk]:
    """Yield the task's items in chunks, sub-tasks side by side, because they share their shots."""
    order = sorted(range(len(task.items)), key=lambda i: (task.group(task.items[i]), i))
    for number, at in enumerate(range(0, len(order), CHUNK_ITEMS)):
        items = tuple(task.items[i] for i in order[at : at + CHUNK_ITEMS])
        pairs = lm.encode([request for item in items for request in item.requests])
        yield Chunk(f"{task.name}-{number}", task, items, lm.schedule(pairs))


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


def task_info(tasks: Sequence[Prepared], work: EvaluateWork) -> dict[str, Any]:
    """Return the protocol of each task: version, shots asked for and used, items that had to do with fewer."""
    asked = {spec.name: spec.shots for spec in work.tasks}
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
