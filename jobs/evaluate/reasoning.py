"""The suite `reasoning`: accuracies of multiple-choice tasks, and bits per byte of their right answers.

At small scale accuracies sit at chance; `answer_bpb` is what tells models apart there (METRICS: lower is better).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.evaluate.chunks import Chunk, chunks, outcomes, prepare, task_info
from jobs.evaluate.harness import Prepared
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.prefix_tree import cut, plan
from jobs.evaluate.results import Mean, Scored, Table, items_parquet
from jobs.evaluate.state import load_state

if TYPE_CHECKING:
    from jobs.context import StageContext
    from orchestrator.spec.work import EvaluateWork

# How many requests are scored again one by one when the precision makes scores depend on the batch.
DEVIATION_REQUESTS = 32


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score every task and commit `items.parquet` with the metrics; goes on where a killed run was."""
    state = load_state(context, work)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans)
    tasks = prepare(work, context.directory(work.items), lm)
    ledger = Ledger(context)
    total = sum(len(task.items) for task in tasks)
    rows: list[Scored] = []
    deviation = 0.0
    for task in tasks:
        for chunk in chunks(task, lm):
            answers = ledger.once(chunk.name, partial(chunk.answers, lm))
            rows += outcomes(chunk, answers)
            if work.precision != "fp32":
                deviation = max(deviation, unbatched_deviation(chunk, answers, lm))
            context.progress(len(rows), total)
    table = summarise(tasks, rows, {spec.name: spec.metric for spec in work.tasks})
    info: dict[str, Any] = {**table.info, **task_info(tasks, work), "chunks_reused": ledger.reused}
    if work.precision != "fp32":
        info["loglikelihood_deviation"] = deviation
    context.commit(work, blobs={"items.parquet": items_parquet(rows)}, metrics=table.metrics, info=info)
    ledger.clear()


def summarise(tasks: Sequence[Prepared], rows: Sequence[Scored], primary: dict[str, str]) -> Table:
    """Return acc, acc_norm, answer_bpb of each task, and over tasks `reasoning_avg` (primary metrics), `answer_bpb`."""
    table = Table()
    averages: list[Mean] = []
    bits: list[Mean] = []
    for task in tasks:
        mine = [row.outcome for row in rows if row.task == task.name]
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
        table.add("reasoning_avg", Mean.over(averages), float(np.mean([task.chance for task in tasks])))
        table.add("answer_bpb", Mean.over(bits))
    return table


def unbatched_deviation(chunk: Chunk, answers: Sequence[Sequence[Sequence[Any]]], lm: PrefixLM) -> float:
    """Return the largest difference in nats between batched scores and those of requests computed one by one."""
    requests = [request for item in chunk.items for request in item.requests][:DEVIATION_REQUESTS]
    batched = [float(pair[0]) for pairs in answers for pair in pairs][: len(requests)]
    alone = plan([cut(*pair, lm.max_length) for pair in lm.encode(requests)], share=False, rows=1)
    return float(np.abs(lm.score(alone).loglikelihood - np.array(batched)).max())
