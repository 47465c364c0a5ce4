"""The suite `reasoning`: accuracies of multiple-choice and generative tasks, and bits per byte of right answers.

At small scale accuracies sit at chance; `answer_bpb` is what tells models apart there (METRICS: lower is better).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.evaluate.chunks import deviations, prepare, task_info
from jobs.evaluate.harness import Prepared
from jobs.evaluate.judging.responses import responses_parquet
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.parts import parts_of
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.results import Mean, Scored, Table, items_parquet
from jobs.evaluate.state import load_state

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score every task and commit `items.parquet` with the metrics; goes on where a killed run was."""
    state = load_state(context, work)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans)
    tasks = prepare(context, work, lm)
    parts = [part for task in tasks for part in parts_of(task, lm, work.new_tokens)]
    items = np.cumsum([len(part.items) for part in parts]).tolist()
    ledger = Ledger(context)
    values = ledger.scored(
        [(part.name, part.compute) for part in parts],
        lambda done: context.progress(items[done - 1], items[-1]),
    )
    rows = [row for part, value in zip(parts, values, strict=True) for row in part.scored(value)]
    table = summarise(tasks, rows, {spec.name: spec.metric for spec in work.tasks})
    info = {**table.info, **task_info(tasks, work), **deviations(values)}
    blobs = {"items.parquet": items_parquet(rows)}
    texts = [row for part, value in zip(parts, values, strict=True) for row in part.responses(value)]
    if texts:
        blobs["responses.parquet"] = responses_parquet(texts)
    ledger.commit(work, blobs=blobs, metrics=table.metrics, info=info)


def summarise(tasks: Sequence[Prepared], rows: Sequence[Scored], primary: dict[str, str]) -> Table:
    """Return acc, acc_norm, answer_bpb of each task, and over tasks `reasoning_avg` (primary metrics), `answer_bpb`."""
    table = Table()
    averages: list[Mean] = []
    bits: list[Mean] = []
    for task in tasks:
        mine = [row.outcome for row in rows if row.task == task.name]
        if task.generation is not None:
            averages.append(Mean.of([o.acc for o in mine], f"{task.name}/exact_match", 0.0, 1.0))
            table.add(f"{task.name}/exact_match", averages[-1])
            continue
        means = {
            "acc": Mean.of([o.acc for o in mine], f"{task.name}/acc", 0.0, 1.0),
            "acc_norm": Mean.of([o.acc_norm for o in mine], f"{task.name}/acc_norm", 0.0, 1.0),
        }
        for metric, mean in means.items():
            if metric in task.metrics or metric == primary[task.name]:
                table.add(f"{task.name}/{metric}", mean, task.chance)
        averages.append(means[primary[task.name]])
        bits.append(Mean.of([o.answer_bpb for o in mine], f"{task.name}/answer_bpb", 0.0))
        table.add(f"{task.name}/answer_bpb", bits[-1])
    if tasks:
        table.add("reasoning_avg", Mean.over(averages), float(np.mean([_chance(task) for task in tasks])))
    if bits:
        table.add("answer_bpb", Mean.over(bits))
    return table


def _chance(task: Prepared) -> float:
    """Return the score of guessing; a generated answer is not guessed."""
    return 0.0 if task.generation is not None else task.chance
