"""The suites `hallucination`, `adversarial` and `ood`: a benchmark's tasks, and their clean twins beside them.

A drop is clean minus shifted accuracy: paired by item where the twin holds the same items (SST-2 styles), else between
the two sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.evaluate.chunks import chunks, outcomes, prepare, task_info
from jobs.evaluate.harness import Item, Prepared
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.responses import GENERATED_ITEMS, generated, responses_parquet
from jobs.evaluate.results import Mean, Outcome, Scored, Table, items_parquet
from jobs.evaluate.state import load_state
from orchestrator.spec.suites import BENCHMARKS, COLUMNS, contrasted_layers

if TYPE_CHECKING:
    from jobs.context import StageContext
    from orchestrator.spec.work import EvaluateWork

Values = Mapping[str, Sequence[Outcome]]


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score or generate every task and commit `items.parquet` (and `responses.parquet`) with the metrics."""
    state = load_state(context, work)
    layers = contrasted_layers(work.dola, work.model.num_layers, tied=work.model.tie_embeddings)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans, dola=layers)
    tasks = prepare(work, context.directory(work.items), lm)
    tasks += prepare(work, context.directory(work.clean_items or work.items), lm, specs=work.clean)
    ledger = Ledger(context)
    total = sum(len(task.items) for task in tasks)
    rows: list[Scored] = []
    texts: list[dict[str, Any]] = []
    for task in tasks:
        for name, items, compute, scored in _parts(task, lm, work):
            answers = ledger.once(name, compute)
            rows += scored(answers)
            if task.generation is not None:
                texts += [
                    {"task": task.name, "item": item.id, "prompt": item.requests[0][0], "response": text, "label": ""}
                    for item, text in zip(items, answers, strict=True)
                ]
            context.progress(len(rows), total)
    values = {task.name: [row.outcome for row in rows if row.task == task.name] for task in tasks}
    table = summarise(work.benchmark, tasks, values)
    blobs = {"items.parquet": items_parquet(rows)}
    if texts:
        blobs["responses.parquet"] = responses_parquet(texts)
    info = {**table.info, **task_info(tasks, work), "dola": list(layers), "chunks_reused": ledger.reused}
    context.commit(work, blobs=blobs, metrics=table.metrics, info=info)
    ledger.clear()


Part = tuple[str, Sequence[Item], Callable[[], Any], Callable[[Any], list[Scored]]]


def _parts(task: Prepared, lm: PrefixLM, work: EvaluateWork) -> list[Part]:
    """Return the task in parts: name, items, what computes its answers, and what they mean."""
    if task.generation is None:
        return [(c.name, c.items, partial(c.answers, lm), partial(outcomes, c)) for c in chunks(task, lm)]
    settings = {**task.generation, "max_gen_toks": work.new_tokens}
    parts: list[Part] = []
    for number, at in enumerate(range(0, len(task.items), GENERATED_ITEMS)):
        items = task.items[at : at + GENERATED_ITEMS]
        compute = partial(generated, lm, [item.requests[0][0] for item in items], settings)
        parts.append((f"{task.name}-{number}", items, compute, partial(_matched, task, items)))
    return parts


def _matched(task: Prepared, items: Sequence[Item], texts: Sequence[str]) -> list[Scored]:
    rows = []
    for item, text in zip(items, texts, strict=True):
        right = task.match(item, text)
        rows.append(Scored(task.name, item.id, 0, Outcome((), right, right, math.nan)))
    return rows


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
        same_items = not BENCHMARKS[benchmark].clean
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
    if not BENCHMARKS[benchmark].clean:
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
