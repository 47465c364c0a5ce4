"""The evaluation tasks a grid may name, with the shots and the metric of the published tables."""

from __future__ import annotations

from orchestrator.spec.cell import TaskSpec

# MoE-Bench Table 2.
REASONING = (
    TaskSpec("winogrande", shots=5, metric="acc"),
    TaskSpec("hellaswag", shots=10, metric="acc_norm"),
    TaskSpec("arc_easy", shots=25, metric="acc"),
    TaskSpec("arc_challenge", shots=25, metric="acc"),
    TaskSpec("piqa", shots=0, metric="acc"),
    TaskSpec("mmlu", shots=5, metric="acc"),
)
TASKS: dict[str, TaskSpec] = {task.name: task for task in REASONING}
