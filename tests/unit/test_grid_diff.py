"""Differences between cells, and comparisons that are refused because more than the declared factor differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.grid.diff import differences, guard
from orchestrator.grid.expand import GridCell
from orchestrator.grid.load import load_grid
from orchestrator.grid.sections import SECTIONS
from orchestrator.spec.identity import plain

Cells = Callable[[str], tuple[GridCell, ...]]


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    def cells(text: str) -> tuple[GridCell, ...]:
        path = tmp_path / "grid.yaml"
        path.write_text(f"base: finetune\n{text}")
        return load_grid(str(path)).cells

    return cells


def test_a_difference_names_the_field_and_both_values(cells: Cells) -> None:
    a, b = cells("factors: {lr: [1e-4, 2e-4]}\n")
    assert differences(a, b) == [("finetune.lr", 1e-4, 2e-4)]
    assert differences(a.cell, a.cell) == []


def test_a_stored_cell_compares_with_a_typed_one(cells: Cells) -> None:
    a, b = cells("factors: {freeze: [none, router]}\n")
    stored = {name: plain(getattr(a.cell, name)) for name in SECTIONS}
    assert differences(stored, b) == [("finetune.freeze", "none", "router")]


def test_execution_is_no_difference(cells: Cells) -> None:
    (a,) = cells("")
    (b,) = cells("set: {execution.resources.finetune.cores: 2, execution.log_every: 5}\n")
    assert differences(a, b) == []


def test_a_phase_that_is_gone_is_one_difference(cells: Cells) -> None:
    (a,) = cells("")
    (b,) = cells("set: {pretrain: null}\n")
    assert [path for path, _, _ in differences(a, b)] == ["pretrain"]


@pytest.mark.parametrize(
    ("axes", "factor", "others"),
    [
        ("{freeze: [none, router]}", "freeze", []),
        ("{[freeze, seed]: [[none, 0], [router, 1]]}", "freeze", []),
        ("{[freeze, lr]: [[none, 1e-4], [router, 2e-4]]}", "freeze", ["finetune.lr: 0.0001 | 0.0002"]),
        ("{[freeze, lr]: [[none, 1e-4], [router, 2e-4]]}", "freeze, lr", []),
        ("{granularity: [2/8, 1/7+1]}", "granularity", []),
        ("{granularity: [2/8, 4/16]}", "top_k", ["model.moe.num_experts: 8 | 16", "model.moe.expert_width: 128 | 64"]),
        ("{preset: [olmoe, smoe]}", "preset", []),
        ("{preset: [olmoe, smoe]}", "renormalise", ["model.moe.preset: olmoe | smoe"]),
        ("{finetune.clip: [1, 2]}", "finetune.clip", []),
        ("{finetune.clip: [1, 2]}", "no such factor", ["finetune.clip: 1.0 | 2.0"]),
    ],
)
def test_a_comparison_in_more_than_the_factor_says_in_what(
    cells: Cells, axes: str, factor: str, others: list[str]
) -> None:
    a, b = cells(f"factors: {axes}\n")
    assert guard(a, b, factor) == others


def test_a_length_in_tokens_makes_the_steps_follow_the_batch(cells: Cells) -> None:
    a, b = cells("factors: {micro_batch: [4, 8]}\nset: {finetune.steps: 1M tokens}\n")
    assert guard(a, b, "micro_batch") == ["finetune.steps: 489 | 245"]


def test_tasks_are_compared_by_their_names(cells: Cells) -> None:
    tasks = "set: {{evaluate.tasks: [{{name: {}, shots: {}}}, {{name: piqa, shots: 0}}]}}\n"
    (a,), (b,) = cells(tasks.format("arc_easy", 0)), cells(tasks.format("arc_easy", 3))
    assert differences(a, b) == [("evaluate.tasks.arc_easy.shots", 0, 3)]
    (c,) = cells("set: {evaluate.tasks: [{name: piqa, shots: 0}, {name: arc_easy, shots: 0}]}\n")
    assert differences(a, c) == [("evaluate.tasks (order)", ["arc_easy", "piqa"], ["piqa", "arc_easy"])]
    (d,) = cells(tasks.format("sciq", 0))
    assert [path for path, _, _ in differences(a, d)] == ["evaluate.tasks.arc_easy", "evaluate.tasks.sciq"]
