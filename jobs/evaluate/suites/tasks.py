"""What the suites that score tasks share, ours and other packages': load, score with shared prefixes, go on, commit.

A suite of its own is then what it makes of the scores:

    def run(context, work):
        scored = score_tasks(context, work)
        table = Table()
        for task in scored.tasks:
            right = [outcome.acc for outcome in scored.outcomes(task.name)]
            table.add(f"{task.name}/errors", Mean.of([1 - value for value in right], "errors", 0.0, 1.0))
        scored.commit(table)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jobs.evaluate.chunks import deviations, prepare, task_info
from jobs.evaluate.harness import Prepared
from jobs.evaluate.judging.responses import responses_parquet
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.parts import parts_of
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.results import Outcome, Scored, Table, items_parquet
from jobs.evaluate.state import State, load_state
from orchestrator.catalog.suites import SUITES
from orchestrator.errors import MoegridError
from orchestrator.spec.suites import contrasted_layers

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork


@dataclass(frozen=True, slots=True)
class ScoredTasks:
    """The tasks of a stage with all their items scored, or answered, by its state."""

    state: State
    tasks: tuple[Prepared, ...]
    rows: tuple[Scored, ...]
    layers: tuple[int, ...]
    _work: EvaluateWork
    _ledger: Ledger
    _deviations: dict[str, float]
    _responses: bytes | None

    def outcomes(self, task: str) -> list[Outcome]:
        """Return the outcomes of a task's items, in their order."""
        return [row.outcome for row in self.rows if row.task == task]

    def commit(self, table: Table, **info: object) -> None:
        """Commit a table's metrics with every item's scores (`items.parquet`) and what was answered."""
        blobs = {"items.parquet": items_parquet(self.rows)}
        if self._responses is not None:
            blobs["responses.parquet"] = self._responses
        told = {**table.info, **task_info(self.tasks, self._work), **self._deviations, **info}
        self._ledger.commit(self._work, blobs=blobs, metrics=table.metrics, info=told)


def score_tasks(context: StageContext, work: EvaluateWork, *, clean: bool = False) -> ScoredTasks:
    """Score every task of `work`, with `clean` its clean twins after them; goes on where a killed run was.

    Each item is scored once, by one rank, whatever the ranks of the job. Raises MoegridError on several ranks in a
    suite that is not `ranked`, since the others would never score theirs.
    """
    if context.world_size > 1 and not SUITES.get(work.suite).ranked:
        raise MoegridError(
            f"suite {work.suite!r} scores tasks on {context.world_size} ranks, of which only the first runs it",
            hint="declare it with ranked=True, or evaluate on one process",
        )
    state = load_state(context, work)
    layers = contrasted_layers(work.dola, work.model.num_layers, tied=work.model.tie_embeddings)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans, dola=layers)
    tasks = prepare(context, work, lm, limit=work.limit)
    tasks += prepare(context, work, lm, limit=work.limit, clean=True) if clean else []
    parts = [part for task in tasks for part in parts_of(task, lm, work.new_tokens)]
    items = np.cumsum([len(part.items) for part in parts]).tolist()
    ledger = Ledger(context)
    values = ledger.scored(
        [(part.name, part.compute) for part in parts], lambda done: context.progress(items[done - 1], items[-1])
    )
    rows = [row for part, value in zip(parts, values, strict=True) for row in part.scored(value)]
    texts = [row for part, value in zip(parts, values, strict=True) for row in part.responses(value)]
    return ScoredTasks(
        state,
        tuple(tasks),
        tuple(rows),
        tuple(layers),
        work,
        ledger,
        deviations(values),
        responses_parquet(texts) if texts else None,
    )
