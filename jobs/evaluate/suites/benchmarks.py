"""The suites `hallucination`, `adversarial` and `ood`: a benchmark's tasks, and their clean twins beside them.

A drop is clean minus shifted accuracy: paired by item where the twin holds the same items (SST-2 styles), else between
the two sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.evaluate.harness import Prepared
from jobs.evaluate.results import Mean, Outcome, Table
from jobs.evaluate.suites.tasks import score_tasks
from orchestrator.catalog.benchmarks import BENCHMARKS, COLUMNS

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

Values = Mapping[str, Sequence[Outcome]]


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score or generate every task and commit `items.parquet` (and `responses.parquet`) with the metrics."""
    scored = score_tasks(context, work, clean=True)
    by_task = {task.name: scored.outcomes(task.name) for task in scored.tasks}
    scored.commit(summarise(work.benchmark, scored.tasks, by_task), dola=list(scored.layers))


def summarise(benchmark: str, tasks: Sequence[Prepared], values: Values) -> Table:
    """Return each task's score and, over the tasks, accuracy, that of the clean twins, and the drop between them."""
    table = Table()
    bits: dict[str, Mean] = {}
    for task in tasks:
        name = COLUMNS.get(task.name, f"{task.name}/acc")
        chance = None if task.generation is not None else _chance(task)
        table.add(name, Mean.of([o.acc for o in values[task.name]], name, 0.0, 1.0), chance)
        if task.generation is None:
            column = f"{task.name}/answer_bpb"
            bits[task.name] = Mean.of([o.answer_bpb for o in values[task.name]], column, 0.0)
            table.add(column, bits[task.name])
    twins = BENCHMARKS[benchmark].twins
    shifted = [task for task in tasks if task.name in twins]
    if shifted:
        names = [task.name for task in shifted]
        same_items = BENCHMARKS[benchmark].same_items
        chance = float(np.mean([task.chance for task in shifted]))
        table.add(f"{benchmark}_acc", _over(names, values, same_items), chance)
        _drops(table, benchmark, names, values)
        table.add(f"{benchmark}_answer_bpb", Mean.over([bits[name] for name in names]))
    return table


def _chance(task: Prepared) -> float:
    """Return the score of guessing; MC2 is the share of probability on true answers, so theirs among the choices."""
    if task.name != "truthfulqa_mc2":
        return task.chance
    return float(np.mean([np.mean(item.doc["mc2_targets"]["labels"]) for item in task.items]))


def _accuracy(outcomes: Sequence[Outcome]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([outcome.acc for outcome in outcomes])


def _over(names: Sequence[str], values: Values, same_items: bool) -> Mean:
    """Return the mean accuracy of tasks; over the same items in other words, these are the sample."""
    if same_items:
        return Mean.of(np.mean([_accuracy(values[name]) for name in names], axis=0), names[0], 0.0, 1.0)
    return Mean.over([Mean.of(_accuracy(values[name]), name, 0.0, 1.0) for name in names])


def _drops(table: Table, benchmark: str, names: Sequence[str], values: Values) -> None:
    """Add the clean accuracy and the drop of the tasks that have a clean twin here."""
    twins = BENCHMARKS[benchmark].twins
    pairs = [(name, twins[name]) for name in names if twins[name] in values]
    if not pairs:
        return
    clean_names = list(dict.fromkeys(twin for _, twin in pairs))
    clean = Mean.over([Mean.of(_accuracy(values[name]), name, 0.0, 1.0) for name in clean_names])
    table.add(f"{benchmark}_clean_acc", clean)
    if BENCHMARKS[benchmark].same_items:
        drops = {name: _accuracy(values[twin]) - _accuracy(values[name]) for name, twin in pairs}
        for name, drop in drops.items():
            table.add(f"{name}/drop", Mean.of(drop, f"{name}/drop", -1.0, 1.0))
        whole = np.mean(list(drops.values()), axis=0)
        table.add(f"{benchmark}_drop", Mean.of(whole, f"{benchmark}_drop", -1.0, 1.0))
        return
    shifted = {name: Mean.of(_accuracy(values[name]), name, 0.0, 1.0) for name, _ in pairs}
    for name, twin in pairs:
        table.add(f"{name}/drop", _minus(Mean.of(_accuracy(values[twin]), twin, 0.0, 1.0), shifted[name]))
    table.add(f"{benchmark}_drop", _minus(clean, Mean.over(list(shifted.values()))))


def _minus(clean: Mean, shifted: Mean) -> Mean:
    """Return the difference of two independent means."""
    return Mean(clean.value - shifted.value, math.hypot(clean.stderr, shifted.stderr), min(clean.n, shifted.n))
