"""The suite `reasoning`: accuracies of multiple-choice and generative tasks, and bits per byte of right answers.

At small scale accuracies sit at chance; `answer_bpb` is what tells models apart there (METRICS: lower is better).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.evaluate.harness import Prepared
from jobs.evaluate.results import Mean, Scored, Table
from jobs.evaluate.suites.tasks import score_tasks

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score every task and commit `items.parquet` with the metrics; goes on where a killed run was."""
    scored = score_tasks(context, work)
    scored.commit(summarise(scored.tasks, scored.rows, {spec.name: spec.metric for spec in work.tasks}))


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
