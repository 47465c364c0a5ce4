"""What an evaluation item says about its right answer: an item that does not say it is refused, never scored.

The harness counts an item whose label is -1, "" or out of range as wrong, and bits per byte would be those of another
choice. Rules here are those of the harness's own task files; `check` says row and column of what breaks them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.catalog.benchmarks import TEMPLATES
from orchestrator.catalog.tasks import task_kind
from orchestrator.errors import SourceError
from orchestrator.registry import load

_LETTERS = tuple("ABCDEFGH")
_HINT = "label the row or leave it out: an item whose right answer is not known cannot be scored"


class _Bad(Exception):
    """(column, what is wrong with it)."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Columns of text that the prompt shows, and the check of choices and label."""

    texts: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]


def check(task: str, row: Mapping[str, object], where: str) -> None:
    """Raise SourceError when `row` does not say which of its choices is right, or has none to choose from.

    A task without a rule is left to the harness. `where` names the file and the row.
    """
    kind = task_kind(task)
    needed = kind.columns if kind is not None else ()
    missing = [column for column in needed if column not in row]
    if missing:
        raise SourceError(
            f"{where} has no column {missing[0]!r}",
            cause=f"it has {', '.join(map(str, row))[:200]}",
            hint=f"task {task!r} reads the columns {', '.join(needed)}",
        )
    if kind is not None and kind.check:
        try:
            load(kind.check, f"task {task!r}")(row)
        except ValueError as error:
            raise SourceError(f"{where}: an item of task {task!r} {error}", hint=_HINT) from None
    rule = _RULES.get(TEMPLATES.get(task, task))
    if rule is None:
        return
    try:
        for column in rule.texts:
            if not isinstance(row.get(column), str):
                raise _Bad(column, f"is {_shown(row.get(column))}, not text")
        rule.check(row)
    except _Bad as bad:
        column, message = bad.args
        raise SourceError(f"{where}: column {column!r} of task {task!r} {message}", hint=_HINT) from None


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _label(column: str, value: object, right: Sequence[object]) -> None:
    # 1, 1.0 and True are equal, but the harness takes an index for a whole number alone.
    if not any(type(value) is type(known) and value == known for known in right):
        known = ", ".join(map(repr, right[:8]))
        raise _Bad(column, f"is {_shown(value)}, none of {known}")


def _scored(column: str, texts: Sequence[object]) -> None:
    """Refuse choices that cannot be scored: none, or one without text."""
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise _Bad(column, f"is {_shown(texts)}, not a list of choices")
    if not texts:
        raise _Bad(column, "has no choices")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise _Bad(column, f"holds {_shown(text)}, which is no choice to score")


def _columns(row: Mapping[str, object], *columns: str) -> list[Any]:
    for column in columns:
        _scored(column, [row[column]])
    return [row[column] for column in columns]


def _listed(row: Mapping[str, object], column: str, count: int = 0) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return texts and labels of a column `{text: [...], label: [...]}`."""
    value = row[column]
    if not isinstance(value, Mapping) or not {"text", "label"} <= value.keys():
        raise _Bad(column, f"is {_shown(value)}, not the lists `text` and `label`")
    texts, labels = value["text"], value["label"]
    _scored(column, texts)
    if not isinstance(labels, Sequence) or len(labels) != len(texts):
        raise _Bad(column, "has not one label a choice")
    if count and len(texts) != count:
        raise _Bad(column, f"has {len(texts)} choices, not {count}")
    return texts, labels


def _arc(row: Mapping[str, object]) -> None:
    _, labels = _listed(row, "choices")
    _label("answerKey", row["answerKey"], labels)


def _openbookqa(row: Mapping[str, object]) -> None:
    _, labels = _listed(row, "choices")
    answer = row["answerKey"]
    _label("answerKey", answer.lstrip() if isinstance(answer, str) else answer, labels)


def _commonsense_qa(row: Mapping[str, object]) -> None:
    _listed(row, "choices", 5)
    _label("answerKey", row["answerKey"], _LETTERS[:5])


def _mmlu(row: Mapping[str, object]) -> None:
    choices = row["choices"]
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) != 4:
        raise _Bad("choices", f"is {_shown(choices)}, not a list of 4")
    for text in choices:
        if not isinstance(text, str):
            raise _Bad("choices", f"holds {_shown(text)}, not text")
    _label("answer", row["answer"], (*range(4), *_LETTERS[:4]))


def _winogrande(row: Mapping[str, Any]) -> None:
    _columns(row, "option1", "option2")
    if not row["sentence"].partition("_")[2].strip():
        raise _Bad("sentence", "has no blank (_) with text after it")
    _label("answer", row["answer"], ("1", "2"))


def _hellaswag(row: Mapping[str, Any]) -> None:
    endings = row["endings"]
    _scored("endings", endings)
    # The harness removes what stands in brackets.
    _scored("endings", [re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")) for text in endings])
    label = row["label"]
    count = len(endings)
    _label("label", label.strip() if isinstance(label, str) else label, (*range(count), *map(str, range(count))))


def _piqa(row: Mapping[str, object]) -> None:
    _label("label", row["label"], (0, 1, *_columns(row, "sol1", "sol2")))


def _social_iqa(row: Mapping[str, object]) -> None:
    _columns(row, "answerA", "answerB", "answerC")
    label = row["label"]
    _label("label", label.strip() if isinstance(label, str) else label, ("1", "2", "3", 1, 2, 3))


def _boolq(row: Mapping[str, object]) -> None:
    _label("label", row["label"], (0, 1, False, True, "no", "yes"))


def _race(row: Mapping[str, Any]) -> None:
    try:
        problems = ast.literal_eval(row["problems"])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise _Bad("problems", "is not a list of questions written as text") from None
    if not isinstance(problems, list) or not problems or not all(isinstance(p, dict) for p in problems):
        raise _Bad("problems", "is not a list of questions written as text")
    for problem in problems:
        if not isinstance(problem.get("question"), str):
            raise _Bad("problems", "holds a question without text")
        options = problem.get("options")
        if not isinstance(options, list) or len(options) < 4:
            raise _Bad("problems", "holds a question that has not 4 options")
        _label("problems", problem.get("answer"), _LETTERS[:4])
    _scored("problems", problems[-1]["options"][:4])


def _cbt(row: Mapping[str, Any]) -> None:
    _scored("options", row["options"])
    if not isinstance(row["sentences"], Sequence) or not all(isinstance(text, str) for text in row["sentences"]):
        raise _Bad("sentences", f"is {_shown(row['sentences'])}, not a list of texts")
    if "XXXXX" not in row["question"]:
        raise _Bad("question", "has no blank (XXXXX)")
    _label("answer", row["answer"], row["options"])


def _lambada(row: Mapping[str, Any]) -> None:
    context, _, word = row["text"].rpartition(" ")
    if not context.strip() or not word.strip():
        raise _Bad("text", "has no last word to tell after others")


def _gsm8k(row: Mapping[str, Any]) -> None:
    answer = row["answer"]
    if not isinstance(answer, str) or not re.search(r"#### -?[0-9]", answer):
        raise _Bad("answer", f"is {_shown(answer)}, and ends with no #### NUMBER")


def _nq_open(row: Mapping[str, Any]) -> None:
    _scored("answer", row["answer"])


def _classes(*names: str) -> Callable[[Mapping[str, Any]], None]:
    def rule(row: Mapping[str, object]) -> None:
        _label("label", row["label"], (*range(len(names)), *names))

    return rule


def _inference(row: Mapping[str, object]) -> None:
    _label("label", row["label"], range(3))


def _sentences(row: Mapping[str, object]) -> None:
    _columns(row, "sentence_good", "sentence_bad")


def _sciq(row: Mapping[str, object]) -> None:
    _columns(row, "distractor1", "distractor2", "distractor3", "correct_answer")


_INFERENCE = _Rule(("premise", "hypothesis"), _inference)
_RULES: dict[str, _Rule] = {
    "winogrande": _Rule(("sentence",), _winogrande),
    "hellaswag": _Rule(("activity_label", "ctx_a", "ctx_b"), _hellaswag),
    "arc_easy": _Rule(("question",), _arc),
    "arc_challenge": _Rule(("question",), _arc),
    "piqa": _Rule(("goal",), _piqa),
    "mmlu": _Rule(("question", "subject"), _mmlu),
    "lambada_openai": _Rule(("text",), _lambada),
    "blimp": _Rule((), _sentences),
    "cbt": _Rule(("question",), _cbt),
    "race": _Rule(("article", "problems"), _race),
    "social_iqa": _Rule(("context", "question"), _social_iqa),
    "commonsense_qa": _Rule(("question",), _commonsense_qa),
    "openbookqa": _Rule(("question_stem",), _openbookqa),
    "sciq": _Rule(("question", "support"), _sciq),
    "boolq": _Rule(("question", "passage"), _boolq),
    "gsm8k": _Rule(("question",), _gsm8k),
    "nq_open": _Rule(("question",), _nq_open),
    "sst2": _Rule(("sentence",), _classes("negative", "positive")),
    "qqp": _Rule(("question1", "question2"), _classes("no", "yes")),
    "mnli": _Rule(("premise", "hypothesis"), _classes("True", "Neither", "False")),
    "mnli_mm": _Rule(("premise", "hypothesis"), _classes("True", "Neither", "False")),
    "qnli": _Rule(("question", "sentence"), _classes("yes", "no")),
    "rte": _Rule(("sentence1", "sentence2"), _classes("True", "False")),
    "anli_r1": _INFERENCE,
    "anli_r2": _INFERENCE,
    "anli_r3": _INFERENCE,
    "snli": _INFERENCE,
    "boss_sa": _Rule(("text",), _classes("negative", "positive", "neutral")),
    "boss_td": _Rule(("text",), _classes("benign", "toxic")),
}
