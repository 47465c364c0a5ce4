"""Evaluation tasks: lm-eval's own with the shots and the metric of the published tables, and those of packages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from orchestrator.catalog.benchmarks import BENCHMARK_OF
from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class TaskKind:
    """One task of `evaluate.tasks`, scored as lm-eval scores it.

    A task of another package says its harness configuration: `template`, "package:path/to/task.yaml" inside it, or
    `config`, the same as a mapping; either may `include: lm_eval:piqa/piqa.yaml`. `source` is where its items come from
    unless a grid says otherwise: `hub://ORG/NAME` with a `revision`, a path such as file:///data/items, or
    "package:folder" inside the package, with <name>/<split>.jsonl. `check`, the dotted path of a function (row), raises
    ValueError for an item without a right answer, before anything is submitted.

    `splits` are the one that is evaluated, then those that shots come from, the first there is; `columns` what the
    template reads. `normalised`: lm-eval reports accuracy by characters too. `generative`: the answer is generated
    and compared (`exact_match`); the suite reasoning reads it, those that score choices leave it out. Of ours:
    `from_files` are not in the pinned wheel, `pooled` have more training rows there than are stored where no shots are
    drawn; `items` are evaluated in all, of about `tokens` each with its answer, and `fixed_shots` are the same for
    every item: times are estimated from these.
    """

    name: str
    shots: int = 0
    metric: str = "acc"
    columns: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    normalised: bool = False
    from_files: bool = False
    pooled: bool = False
    generative: bool = False
    template: str = ""
    config: Mapping[str, object] = field(default_factory=dict, hash=False)
    source: str = ""
    revision: str = ""
    check: str = ""
    items: int = 0
    tokens: int = 0
    fixed_shots: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if self.name in BENCHMARK_OF:
            raise ValueError(f"task {self.name!r} is one of the benchmark {BENCHMARK_OF[self.name]!r}: rename it")


_SCIENCE = ("question", "choices", "answerKey")
_VALIDATION = ("validation", "train")
_TEST = ("test", "train", "validation")
_OURS = (
    # MoE-Bench Table 2.
    TaskKind(
        "winogrande",
        5,
        "acc",
        ("sentence", "option1", "option2", "answer"),
        _VALIDATION,
        pooled=True,
        items=1267,
        tokens=27,
    ),
    TaskKind(
        "hellaswag",
        10,
        "acc_norm",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _VALIDATION,
        normalised=True,
        pooled=True,
        items=10042,
        tokens=90,
    ),
    TaskKind("arc_easy", 25, "acc", _SCIENCE, _TEST, normalised=True, pooled=True, items=2376, tokens=35),
    TaskKind("arc_challenge", 25, "acc", _SCIENCE, _TEST, normalised=True, pooled=True, items=1172, tokens=42),
    TaskKind(
        "piqa",
        0,
        "acc",
        ("goal", "sol1", "sol2", "label"),
        _VALIDATION,
        normalised=True,
        pooled=True,
        items=1838,
        tokens=45,
    ),
    TaskKind(
        "mmlu",
        5,
        "acc",
        ("question", "subject", "choices", "answer"),
        ("test", "dev"),
        items=14042,
        tokens=110,
        fixed_shots=True,
    ),
    # LibMoE's zero-shot tasks, and further ones.
    TaskKind("lambada_openai", columns=("text",), splits=("test",)),
    TaskKind("blimp", columns=("sentence_good", "sentence_bad", "UID"), splits=("train",), from_files=True),
    TaskKind(
        "cbt",
        columns=("sentences", "question", "answer", "options"),
        splits=("test", "validation"),
        from_files=True,
    ),
    TaskKind("race", columns=("article", "problems"), splits=("test",), from_files=True),
    TaskKind(
        "social_iqa",
        columns=("context", "question", "answerA", "answerB", "answerC", "label"),
        splits=_VALIDATION,
        pooled=True,
    ),
    TaskKind("commonsense_qa", columns=_SCIENCE, splits=_VALIDATION, pooled=True),
    TaskKind("openbookqa", 0, "acc_norm", ("question_stem", "choices", "answerKey"), _TEST, True, pooled=True),
    TaskKind(
        "sciq",
        columns=("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
        splits=("validation",),
        normalised=True,
    ),
    # Answers that are generated.
    TaskKind("gsm8k", 5, "acc", ("question", "answer"), ("test", "train"), from_files=True, generative=True),
    TaskKind("boolq", columns=("question", "passage", "label"), splits=_VALIDATION, pooled=True),
)
TASKS = Registry("tasks", "task", TaskKind, MappingProxyType({kind.name: kind for kind in _OURS}))


def task_kind(task: str) -> TaskKind | None:
    """Return what is known of a task, None of a benchmark's and of one that nobody provides."""
    return None if task in BENCHMARK_OF else TASKS.find(task)


def is_generative(task: str) -> bool:
    """Return whether a task's answers are generated."""
    kind = task_kind(task)
    return kind is not None and kind.generative


def splits_of(task: str) -> tuple[str, ...]:
    """Return the splits that the harness reads: the evaluated one, then those of shots; () where not known."""
    kind = task_kind(task)
    return kind.splits if kind is not None else ()


def splits_read(task: str, present: Collection[str]) -> tuple[str, ...]:
    """Return which of the splits that are there a task reads; all of them where that is not known."""
    splits = splits_of(task)
    if not splits:
        return tuple(present)
    evaluated, *shots = splits
    return tuple(split for split in (evaluated, *[s for s in shots if s in present][:1]) if split in present)
