"""The task NAME. In a grid: `plugins: [./NAME]`, suite `reasoning`, and under `set:` `evaluate.tasks: {NAME: {}}`.

Its items lie in `items/NAME/<split>.jsonl`, a row each with the columns below.
"""

from __future__ import annotations

from typing import Any

from moegrid.extend import TaskKind


def check(row: dict[str, Any]) -> None:
    """Refuse an item without a right answer while the grid is read."""
    if not 0 <= row["right"] < len(row["options"]):
        raise ValueError(f"has {len(row['options'])} options, and {row['right']} as the right one")


KIND = TaskKind(
    "NAME",
    shots=1,
    columns=("question", "options", "right"),
    splits=("validation", "train"),  # the one that is evaluated, then that of the shots
    source="NAME:items",
    check="NAME:check",
    config={  # as lm-eval's task files; a file instead: template="NAME:task.yaml"
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "training_split": "train",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
)
