"""What a cell measures on one state: the work of each suite, with only the fields that the suite reads set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import is_generative
from orchestrator.spec.cell import Cell, EvaluateSpec
from orchestrator.spec.suites import Use, judges_of
from orchestrator.spec.work import EvaluateWork, GenerateWork, JudgeWork

# Kinds of stages whose metrics are results.
MEASURING = ("evaluate", "judge")
# Tasks whose answers are generated.
GENERATED = ("nq_open",)


def evaluation(cell: Cell, suite: str, state: str, tokenizer: str, items: str, tokens: str) -> EvaluateWork:
    """Return the evaluation of one suite, with only the fields this suite reads set."""
    spec: EvaluateSpec = cell.evaluate
    kind = SUITES.get(suite)
    fields: dict[str, Any] = {"items": "", "tokens": ""}
    if "text" in kind.reads:
        fields |= {"tokens": tokens, "val_tokens": spec.val_tokens}
    if "shown" in kind.reads:
        fields["tokens"] = tokens
    if "tasks" in kind.reads:
        # The key of the items says where they come from.
        tasks = tuple(
            dataclasses.replace(task, source="", revision="", digest="")
            for task in spec.tasks
            if kind.generates or not is_generative(task.name)
        )
        if any(is_generative(task.name) for task in tasks):
            fields["new_tokens"] = spec.generation.new_tokens
        fields |= {"items": items, "tasks": tasks}
    settings: dict[str, Any] = {
        "seed": cell.seed.eval,
        "shots": spec.shots,
        "limit": spec.efficiency_limit,
        "routing_seeds": spec.routing_seeds,
        "metrics": spec.metrics,
    }
    fields |= {name: settings[name] for name in kind.settings}
    if parameters := spec.suite_parameters.get(suite):
        fields["parameters"] = Parameters(parameters)
    return EvaluateWork(
        suite=suite,
        state=state,
        model=cell.model,
        tokenizer=tokenizer,
        max_length=spec.max_length,
        precision=spec.precision,
        **fields,
    )


def benchmark_works(
    cell: Cell, suite: str, use: Use, state: str, tokenizer: str, items: str, clean: str
) -> Iterator[tuple[EvaluateWork | GenerateWork | JudgeWork, str]]:
    """Yield the works of one benchmark with their labels: one, or the responses and each judge's scores of them."""
    spec = cell.evaluate
    judging = SUITES.get(suite).judged
    if judging is None:
        label = f"routing of {use.name}" if SUITES.get(suite).routed else use.name
        yield benchmark_evaluation(cell, suite, use, state, tokenizer, items, clean), label
        return
    responses = GenerateWork(
        state=state,
        model=cell.model,
        tokenizer=tokenizer,
        items=items,
        benchmark=use.name,
        tasks=use.tasks,
        generation=spec.generation,
        max_length=spec.max_length,
        precision=spec.precision,
        dola=spec.dola,
        seed=cell.seed.eval if spec.generation.temperature else 0,
    )
    yield responses, f"responses to {use.name}"
    for judge in judges_of(spec, judging):
        yield JudgeWork(suite, responses.key(), judge), f"{use.name} by {judge.name}"


def benchmark_evaluation(
    cell: Cell, suite: str, use: Use, state: str, tokenizer: str, items: str, clean: str
) -> EvaluateWork:
    """Return the evaluation of one benchmark of a suite beyond reasoning."""
    spec = cell.evaluate
    return EvaluateWork(
        suite=suite,
        state=state,
        model=cell.model,
        tokenizer=tokenizer,
        items=items,
        tokens="",
        tasks=use.tasks,
        max_length=spec.max_length,
        precision=spec.precision,
        seed=cell.seed.eval,
        benchmark=use.name,
        clean_items=clean,
        clean=use.clean,
        dola=spec.dola if SUITES.get(suite).contrasted else "",
        new_tokens=spec.generation.new_tokens if set(GENERATED) & {task.name for task in use.tasks} else 0,
    )
