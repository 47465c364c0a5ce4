"""The items of the suites beyond reasoning: a user's file, or the hub, in the columns that lm-eval's tasks read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.catalog.benchmarks import BENCHMARK_OF, BENCHMARKS, GLUE, SAFETY_SETS
from orchestrator.data import benchmark_files as files
from orchestrator.data.benchmark_files import Row, Splits, read_benchmark
from orchestrator.errors import SourceAway, SourceError
from orchestrator.spec.cell import DataSpec

# (configuration or "" for the source's own, split) -> rows
Load = Callable[[str, str], Iterable[Row]]
_ADVGLUE = {"mnli_mm": "adv_mnli_mismatched"}
_GLUE = {"mnli_mm": "mnli"}


def benchmark_splits(data: DataSpec, tasks: Iterable[str]) -> Iterator[tuple[str, Splits]]:
    """Yield (task, its rows by split) of a benchmark; SourceError when the source lacks a file, a split or a column."""
    wanted = list(tasks)
    name = BENCHMARK_OF[wanted[0]]
    if data.source.startswith("file://"):
        found = read_benchmark(name, Path(data.source.removeprefix("file://")))
    elif data.source.startswith("hub://") and name in _HUB:
        found = _HUB[name](_loader(data.source), wanted)
    else:
        raise SourceError(
            f"benchmark {name} cannot come from {data.source}",
            hint=f"use file://: it is read from {BENCHMARKS[name].files}",
        )
    for task in wanted:
        yield task, found[task]


def _loader(source: str) -> Load:
    from jobs.data.hub import load_hub

    def load(config: str, split: str) -> Iterable[Row]:
        base, at, revision = source.partition("@")
        named = f"{base}:{config}" if config and ":" not in base.removeprefix("hub://") else base
        rows: Any = load_hub(f"{named}{at}{revision}", split)
        return (dict(row) for row in rows)

    return load


def _safety(load: Load, tasks: list[str]) -> dict[str, Splits]:
    """Prompts of splits named after the sets."""
    return {task: {"test": files.prompt_rows("safety", f"split {task}", load("", task))} for task in SAFETY_SETS}


def _xstest(load: Load, tasks: list[str]) -> dict[str, Splits]:
    for split in ("test", "train"):
        try:
            rows = list(load("", split))
        except SourceAway:
            raise
        except SourceError as error:
            failed = error
            continue
        return {"xstest": {"test": files.xstest_rows(f"split {split}", rows)}}
    raise failed


def _advglue(load: Load, tasks: list[str]) -> dict[str, Splits]:
    found: dict[str, Splits] = {}
    for task in GLUE:
        config = _ADVGLUE.get(task, f"adv_{task}")
        rows = files.glue_rows("advglue", task, config, load(config, "validation"))
        found[f"advglue_{task}"] = {files.VALIDATION[task]: rows}
    return found


def _glue(load: Load, tasks: list[str]) -> dict[str, Splits]:
    found: dict[str, Splits] = {}
    for task in tasks:
        split = files.VALIDATION[task]
        found[task] = {split: files.glue_rows("glue", task, task, load(_GLUE.get(task, task), split))}
    return found


def _anli(load: Load, tasks: list[str]) -> dict[str, Splits]:
    splits = {f"anli_r{number}": f"test_r{number}" for number in (1, 2, 3)}
    return {task: {split: files.inference_rows("anli", split, load("", split))} for task, split in splits.items()}


def _truthfulqa(load: Load, tasks: list[str]) -> dict[str, Splits]:
    rows = files.truthfulqa_rows("validation", load("multiple_choice", "validation"))
    return {task: {"validation": rows} for task in tasks}


_HUB: dict[str, Callable[[Load, list[str]], dict[str, Splits]]] = {
    "safety": _safety,
    "xstest": _xstest,
    "nq_open": lambda load, _: {
        "nq_open": {"validation": files.question_rows("validation", load("", "validation"))},
    },
    "truthfulqa": _truthfulqa,
    "advglue": _advglue,
    "glue": _glue,
    "anli": _anli,
    "snli": lambda load, _: {"snli": {"test": files.inference_rows("snli", "test", load("", "test"))}},
}
