"""The columns that a cell's evaluations make: what `primary`, `search.metric` and `adaptive.metric` may name.

The data plane computes them (jobs/evaluate, jobs/probe); a test compares the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from orchestrator.catalog.benchmarks import BENCHMARKS, COLUMNS
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.lmms import LMMS_EVAL, LMMS_TASKS
from orchestrator.catalog.metrics import DISTURBED, OF_PICTURES, OF_TOKENS, ROUTING, SIMILARITY
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.suites import SUITES, Judging
from orchestrator.catalog.tasks import TASKS, is_generative, task_kind
from orchestrator.errors import did_you_mean
from orchestrator.registry import load
from orchestrator.spec.cell import Cell, EvaluateSpec, JudgeSpec
from orchestrator.spec.suites import Use, judges_of, uses
from orchestrator.spec.tasks import PUBLISHED

GENERATED = ("nq_open",)  # answers that are generated have no likelihood


def columns_of(cell: Cell, at: float | None = None) -> frozenset[str]:
    """Return the columns that the cell has when it is evaluated at the fraction `at`, by default its last one."""
    at = max(cell.evaluate.at) if at is None else at
    dense = not kind_of(cell.model.moe).routes
    found: set[str] = set()
    for suite in cell.evaluate.suites:
        # Probes are for models that have experts, interventions for their final states unless a grid wants all.
        kind, every = SUITES.get(suite), cell.evaluate.interventions == "every"
        if (not dense or not (kind.final or kind.routed)) and (at == 1.0 or every or not kind.final):
            found |= suite_columns(cell.evaluate, suite)
    return frozenset(found)


def suite_columns(evaluate: EvaluateSpec, suite: str) -> frozenset[str]:
    """Return the columns of one suite, as `evaluate` sets its tasks, benchmarks and judges."""
    names = [task.name for task in evaluate.tasks if not is_generative(task.name)]
    kind = SUITES.get(suite)
    if kind.columns_by:
        return frozenset(load(kind.columns_by, SUITES.who(suite))(evaluate))
    if "benchmarks" not in kind.reads:
        return frozenset((*kind.columns, *(f"{task}/{name}" for task in names for name in kind.task_columns)))
    found: set[str] = set()
    for use in uses(evaluate, suite):
        found |= set(_judged(evaluate, kind.judged) if kind.judged else _benchmark(use))
    return frozenset(found)


def unknown_column(name: str, cells: Sequence[Cell], at: float | None = None) -> str | None:
    """Return None when the evaluations of some cell make the column `name`, else how to mend it."""
    made = _made(cells, at)
    if name in made:
        return None
    near = did_you_mean(name, sorted(made), "")
    if near.startswith("did you mean") and name not in every_column():
        return near
    suites = [suite for suite, columns in _every().items() if name in columns]
    if suites and name in _made(cells, 1.0):
        return "it is measured at the end of training alone: add 1.0 to at, or use scheduler: fifo"
    if suites:
        task = name.partition("/")[0]
        where = f" with the task {task}" if task in TASKS.builtins else ""
        return f"the suite {suites[0]!r}{where} makes it: evaluate that, or name another column"
    plain = [column for column in sorted(made) if "/" not in column]
    return f"columns: {', '.join(plain)}" if plain else "evaluate a suite that makes it"


def sourced(cell: Cell) -> Cell:
    """Return the cell with a source for every benchmark: what it lacks the plan says, and its columns are right."""
    return dataclasses.replace(cell, evaluate=_sourced(cell.evaluate))


def _sourced(evaluate: EvaluateSpec) -> EvaluateSpec:
    lacking = {name: spec for name, spec in evaluate.benchmarks.items() if not spec.source}
    sources: dict[str, Any] = {name: dataclasses.replace(spec, source="file://") for name, spec in lacking.items()}
    return dataclasses.replace(evaluate, **sources)


def every_column() -> frozenset[str]:
    """Return every column that some suite makes with its known tasks, benchmarks and judges."""
    return frozenset().union(*_every().values())


@cache
def _every() -> dict[str, frozenset[str]]:
    judges = tuple(JudgeSpec(name) for name in JUDGES.builtins)
    whole = _sourced(EvaluateSpec(tasks=tuple(PUBLISHED.values()), judges=judges))
    return {suite: suite_columns(whole, suite) for suite in SUITES.builtins}


def _made(cells: Sequence[Cell], at: float | None) -> frozenset[str]:
    sections = {(id(cell.evaluate), kind_of(cell.model.moe).routes): cell for cell in cells}
    return frozenset().union(*(columns_of(cell, at) for cell in sections.values()))


def of_probe(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of the suite `probe`: those of the held-out text, and those of each task."""
    routing = (*ROUTING, *evaluate.metrics)
    names = [task.name for task in evaluate.tasks if not is_generative(task.name)]
    yield from (*routing, "null_share", *SIMILARITY, *(DISTURBED if names else ()))
    yield from (f"{task}/{name}" for task in names for name in (*routing, *DISTURBED, *OF_TOKENS))


def of_seeing_probe(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of the suite `seeing_probe`: the routing of each component that sees."""
    made = (*ROUTING, *SIMILARITY, *DISTURBED)
    yield from (f"{component}/{name}" for component in ("encoder", "connector") for name in made)


def of_pictures(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of the suite `seeing`."""
    for one in evaluate.pictures:
        if one.protocol != LMMS_EVAL:
            yield from (f"{one.name}/{task}/{column}" for task in one.tasks for column in OF_PICTURES)


def of_lmms(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of the suite `lmms_eval`."""
    for one in evaluate.pictures:
        if one.protocol == LMMS_EVAL:
            known = (LMMS_TASKS[task] for task in one.tasks if task in LMMS_TASKS)
            yield from (f"{one.name}/{task.name}/{score}" for task in known for score in task.scores)


def of_routing_shift(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of routing's shift: those of the tasks with a clean twin, and their mean."""
    suites = {suite for benchmark in BENCHMARKS.values() for suite in benchmark.also}
    for use in (use for suite in sorted(suites) for use in uses(evaluate, suite)):
        twins, clean = BENCHMARKS[use.name].twins, {task.name for task in use.clean}
        shifted = [task.name for task in use.tasks if twins.get(task.name) in clean]
        yield from (f"{name}/routing_shift" for name in shifted)
        if shifted:
            yield f"{use.name}_routing_shift"


def of_reasoning(evaluate: EvaluateSpec) -> Iterator[str]:
    """Yield the columns of the suite `reasoning`."""
    for task in evaluate.tasks:
        if is_generative(task.name):
            yield f"{task.name}/exact_match"
            continue
        yield from (f"{task.name}/acc", f"{task.name}/{task.metric}", f"{task.name}/answer_bpb")
        kind = task_kind(task.name)
        if kind is not None and kind.normalised:
            yield f"{task.name}/acc_norm"
    if evaluate.tasks:
        yield "reasoning_avg"
    if not all(is_generative(task.name) for task in evaluate.tasks):
        yield "answer_bpb"


def _judged(evaluate: EvaluateSpec, judging: Judging) -> Iterator[str]:
    yield from (*judging.columns, f"{judging.prefix}_empty")
    shown = () if judging.columns else tuple(JUDGES.get(judge.name).shown for judge in judges_of(evaluate, judging))
    yield from (f"{prefix}_{name}" for name in shown for prefix in (judging.prefix, *judging.sets))


def _benchmark(use: Use) -> Iterator[str]:
    twins = BENCHMARKS[use.name].twins
    clean = {task.name for task in use.clean}
    for task in (*use.tasks, *use.clean):
        yield COLUMNS.get(task.name, f"{task.name}/acc")
        if task.name not in GENERATED:
            yield f"{task.name}/answer_bpb"
        if twins.get(task.name) in clean:
            yield from (f"{task.name}/drop", f"{use.name}_drop", f"{use.name}_clean_acc")
    if any(task.name in twins for task in use.tasks):
        yield from (f"{use.name}_acc", f"{use.name}_answer_bpb")
