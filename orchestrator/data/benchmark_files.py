"""The published files of the benchmarks as rows in the columns that lm-eval's tasks read.

The plan reads a user's file with this to refuse it early; the node reads it with this to evaluate it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.catalog.benchmarks import BENCHMARKS, BOSS, GLUE, SAFETY_SETS, STYLES
from orchestrator.catalog.labelled import LABELLED
from orchestrator.data import truthfulqa
from orchestrator.data.answers import check
from orchestrator.data.layouts import classified, labelled
from orchestrator.data.rows import read_file
from orchestrator.errors import SourceError
from orchestrator.spec.data import DataSpec

Row = dict[str, Any]
Splits = dict[str, list[Row]]  # split -> rows
Tasks = dict[str, Splits]

_ENTAILMENT = {"entailment": 0, "neutral": 1, "contradiction": 2, "e": 0, "n": 1, "c": 2, "0": 0, "1": 1, "2": 2}
_PROMPTS = ("prompt", "instruction", "instructions", "text")
_GLUE_COLUMNS = {
    "sst2": ("sentence", "label"),
    "qqp": ("question1", "question2", "label"),
    "mnli": ("premise", "hypothesis", "label"),
    "mnli_mm": ("premise", "hypothesis", "label"),
    "qnli": ("question", "sentence", "label"),
    "rte": ("sentence1", "sentence2", "label"),
}


def read_benchmark(name: str, path: Path) -> Tasks:
    """Return the items of the benchmark `name` in a user's file or folder; SourceError when they are not its own."""
    if not path.exists():
        raise SourceError(f"{path} does not exist", hint=f"benchmark {name} is read from {BENCHMARKS[name].files}")
    tasks = _READERS[name](path)
    for task, splits in tasks.items():
        for split, rows in splits.items():
            if not rows:
                raise SourceError(f"{path} has no items of {task}, split {split}", hint=_expected(name))
    return tasks


def read_labels(path: Path) -> dict[tuple[str, str], list[float]]:
    """Return a person's scores by (prompt, response) of a .jsonl or .csv file; SourceError when one has none."""
    rows = csv.DictReader(io.StringIO(_text(path))) if path.suffix == ".csv" else _lines(_text(path), path)
    hint = "labels have the columns prompt, response and score (.jsonl or .csv)"
    found: dict[tuple[str, str], list[float]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise SourceError(f"{where} is no object", hint=hint)
        if missing := [name for name in ("prompt", "response", "score") if row.get(name) is None]:
            raise SourceError(f"{where} has no {missing[0]!r}", cause=f"it has {', '.join(map(str, row))}", hint=hint)
        try:
            score = float(row["score"])
        except (ValueError, TypeError):
            score = math.nan
        if not math.isfinite(score) or isinstance(row["score"], bool):
            raise SourceError(f"{where}: column 'score' is {row['score']!r}, not a number", hint=hint)
        found.setdefault((str(row["prompt"]), str(row["response"])), []).append(score)
    if not found:
        raise SourceError(f"{path} has no labels", hint=hint)
    return found


def prompt_rows(name: str, where: str, rows: Iterable[object]) -> list[Row]:
    """Return prompts as rows with `prompt`, from texts or from objects with one of the usual columns."""
    found = []
    for number, row in enumerate(rows, 1):
        text = row
        if isinstance(row, Mapping):
            column = next((column for column in _PROMPTS if column in row), None)
            if column is None:
                raise _lacks(name, f"{where}, row {number}", "prompt", row)
            text = row[column]
        found.append({"prompt": _prompt(name, f"{where}, row {number}", text)})
    return found


def _prompt(name: str, where: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise SourceError(f"{where}: a prompt must be text, not {text!r:.60}", hint=_expected(name))
    return text.strip()


def xstest_rows(where: str, rows: Iterable[Mapping[str, object]]) -> list[Row]:
    """Return prompt, label (safe | unsafe) and type; before v2 a type that starts with `contrast` was unsafe."""
    found = []
    for number, row in enumerate(rows, 1):
        _require("xstest", f"{where}, row {number}", row, ("prompt", "type"))
        label = row.get("label", "unsafe" if str(row["type"]).startswith("contrast") else "safe")
        if label not in ("safe", "unsafe"):
            raise SourceError(f"{where}, row {number}: column 'label' is {label!r}, neither safe nor unsafe")
        _prompt("xstest", f"{where}, row {number}", row["prompt"])
        found.append({"prompt": row["prompt"], "label": label, "type": row["type"]})
    return found


def glue_rows(name: str, task: str, where: str, rows: Iterable[Mapping[str, object]]) -> list[Row]:
    """Return the rows of a GLUE task with whole-number labels; SourceError where one says no answer of the task."""
    columns = _GLUE_COLUMNS[task]
    found = []
    for number, row in enumerate(rows, 1):
        _require(name, f"{where}, row {number}", row, columns)
        made = {column: row[column] for column in columns}
        made["label"] = _label(row["label"], name, f"{where}, row {number}", {})
        check(task, made, f"{where}, row {number}")
        found.append(made)
    return found


def inference_rows(name: str, where: str, rows: Iterable[Mapping[str, object]]) -> list[Row]:
    """Return premise, hypothesis and label (0 entailment, 1 neutral, 2 contradiction) of ANLI or SNLI rows.

    SNLI publishes pairs on which its annotators did not agree ("-", on the hub -1): they are no items.
    """
    found = []
    for number, row in enumerate(rows, 1):
        here = f"{where}, row {number}"
        if "sentence1" in row and "gold_label" in row:
            premise, hypothesis, label = row["sentence1"], row.get("sentence2"), row["gold_label"]
        else:
            _require(name, here, row, ("hypothesis", "label"))
            premise, hypothesis, label = row.get("premise", row.get("context")), row["hypothesis"], row["label"]
        if premise is None or hypothesis is None:
            raise _lacks(name, here, "premise" if premise is None else "hypothesis", row)
        if name in ("snli", "snli_hard") and label in ("-", -1):
            continue
        made = {"premise": premise, "hypothesis": hypothesis, "label": _label(label, name, here, _ENTAILMENT)}
        check("snli", made, here)
        found.append(made)
    return found


def truthfulqa_rows(where: str, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return question, mc1_targets and mc2_targets; each has as many labels as choices, and a true one."""
    found = []
    for number, row in enumerate(rows, 1):
        here = f"{where}, row {number}"
        if isinstance(row, Mapping):
            row = truthfulqa.listed(here, dict(row))
        _require("truthfulqa", here, row, truthfulqa.COLUMNS)
        for column in ("mc1_targets", "mc2_targets"):
            targets = row[column]
            _require("truthfulqa", f"{here}, {column}", targets, ("choices", "labels"))
            choices, labels = targets["choices"], targets["labels"]
            lists = isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels)
            if not lists or 1 not in labels or any(type(label) is not int or label not in (0, 1) for label in labels):
                raise SourceError(f"{here}: {column} needs one label a choice, 0 or 1, and a true one")
            if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
                raise SourceError(f"{here}: {column} has a choice without text")
        if row["mc1_targets"]["labels"][0] != 1:
            raise SourceError(f"{here}: the first choice of mc1_targets must be the true one")
        found.append({column: row[column] for column in truthfulqa.COLUMNS})
    return found


def question_rows(where: str, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return question and answer (a list) of NQ-open rows."""
    found = []
    for number, row in enumerate(rows, 1):
        _require("nq_open", f"{where}, row {number}", row, ("question", "answer"))
        answer = row["answer"]
        made = {"question": row["question"], "answer": [answer] if isinstance(answer, str) else answer}
        check("nq_open", made, f"{where}, row {number}")
        found.append({**made, "answer": list(made["answer"])})
    return found


def _safety(path: Path) -> Tasks:
    found: Tasks = {}
    for task, published in SAFETY_SETS.items():
        file = _file(path, "safety", *(f"{stem}.{kind}" for stem in (published, task) for kind in ("json", "jsonl")))
        data = _json(file)
        if isinstance(data, Mapping):
            _require("safety", str(file), data, ("instructions",))
            data = data["instructions"]
        found[task] = {"test": prompt_rows("safety", str(file), data)}
    return found


def _xstest(path: Path) -> Tasks:
    file = _file(path, "xstest", "xstest_prompts.csv", "xstest.csv", "xstest.jsonl")
    rows = list(csv.DictReader(io.StringIO(_text(file)))) if file.suffix == ".csv" else _json(file)
    return {"xstest": {"test": xstest_rows(str(file), rows)}}


def _nq_open(path: Path) -> Tasks:
    file = _file(path, "nq_open", "nq_open/validation.jsonl", "nq_open.jsonl", "validation.jsonl")
    return {"nq_open": {"validation": question_rows(str(file), _json(file))}}


def _truthfulqa(path: Path) -> Tasks:
    file = _file(path, "truthfulqa", "truthfulqa_mc.jsonl", "mc_task.json", "truthfulqa.jsonl", "questions.json")
    data = _json(file)
    if isinstance(data, Mapping):
        _require("truthfulqa", str(file), data, ("examples",))
        data = data["examples"]
    rows = truthfulqa_rows(str(file), data)
    return {task: {"validation": rows} for task in BENCHMARKS["truthfulqa"].tasks}


def _advglue(path: Path) -> Tasks:
    file = _file(path, "advglue", "dev.json", "advglue_dev.json")
    data = _json(file)
    found: Tasks = {}
    for task in GLUE:
        published = task.replace("_", "-")
        _require("advglue", str(file), data, (published,))
        rows = glue_rows("advglue", task, f"{file}, {published}", data[published])
        found[f"advglue_{task}"] = {VALIDATION[task]: rows}
    return found


def _glue(path: Path) -> Tasks:
    found: Tasks = {}
    for task in GLUE:
        file = _file(path, "glue", f"{task}.jsonl", f"{task}/validation.jsonl")
        found[task] = {VALIDATION[task]: glue_rows("glue", task, str(file), _json(file))}
    return found


def _anli(path: Path) -> Tasks:
    found: Tasks = {}
    for number in (1, 2, 3):
        file = _file(path, "anli", f"R{number}/test.jsonl", f"anli_r{number}.jsonl", f"anli_r{number}/test.jsonl")
        found[f"anli_r{number}"] = {f"test_r{number}": inference_rows("anli", str(file), _json(file))}
    return found


def _snli(path: Path) -> Tasks:
    file = _file(path, "snli", "snli_1.0_test.jsonl", "snli.jsonl")
    return {"snli": {"test": inference_rows("snli", str(file), _json(file))}}


def _snli_hard(path: Path) -> Tasks:
    file = _file(path, "snli_hard", "snli_1.0_test_hard.jsonl", "snli_hard.jsonl")
    return {"snli_hard": {"test": inference_rows("snli_hard", str(file), _json(file))}}


def _boss(name: str) -> Callable[[Path], Tasks]:
    """Return the reader of one of BOSS's folders: `<set>/test.tsv` with Text (or Premise, Hypothesis) and Label."""
    tuned = {"boss_nli": "nli", "boss_sa": "sentiment", "boss_td": "toxicity"}[name]

    def read(path: Path) -> Tasks:
        found: Tasks = {}
        for one in BOSS[name][1]:
            file = _file(path, name, f"{one}/test.tsv", f"{one}.tsv")
            try:
                rows = [
                    _classes(tuned, row, where) for where, row in labelled(read_file(file), DataSpec("", task=tuned))
                ]
            except SourceError as error:
                raise SourceError(error.error, cause=error.cause or error.hint, hint=_expected(name)) from None
            found[f"{name}_{one}"] = {"test": rows}
        return found

    return read


def _classes(task: str, row: Mapping[str, object], where: str) -> Row:
    """Return a row of a classification with the columns that its test reads, and the number of its answer."""
    answer = classified(row, task, where)[1]
    kind = LABELLED[task]
    parts = {part: row[next(name for name in names if name in row)] for part, names in kind.columns.items()}
    return {**parts, "label": list(dict.fromkeys(kind.answers.values())).index(answer)}


def _sst2_styles(path: Path) -> Tasks:
    file = _file(path, "sst2_styles", "sst2_styles.json", "style.json")
    data = _json(file)
    _require("sst2_styles", str(file), data, ("dev",))
    found: Tasks = {}
    for style in ("base", *STYLES):
        _require("sst2_styles", f"{file}, dev", data["dev"], (style,))
        rows = glue_rows("sst2_styles", "sst2", f"{file}, dev, {style}", data["dev"][style])
        demos = data.get("train_demo", {}).get("base_0", ())
        # Shots are the clean ones for every style: what shifts is the items alone.
        shots = glue_rows("sst2_styles", "sst2", f"{file}, train_demo", demos)
        found[f"sst2_{style}"] = {"validation": rows, **({"train": shots} if shots else {})}
    clean = found["sst2_base"]["validation"]
    for task, splits in found.items():
        if [row["label"] for row in splits["validation"]] != [row["label"] for row in clean]:
            raise SourceError(f"{file}: the items of {task} are not those of its clean twin", hint="labels must agree")
    return found


# The split that lm-eval's own file of each task evaluates.
VALIDATION = dict.fromkeys(GLUE, "validation") | {
    "mnli": "validation_matched",
    "mnli_mm": "validation_mismatched",
}
_READERS: dict[str, Callable[[Path], Tasks]] = {
    "safety": _safety,
    "xstest": _xstest,
    "nq_open": _nq_open,
    "truthfulqa": _truthfulqa,
    "advglue": _advglue,
    "glue": _glue,
    "anli": _anli,
    "snli": _snli,
    "sst2_styles": _sst2_styles,
    "snli_hard": _snli_hard,
    **{name: _boss(name) for name in BOSS},
}


def _file(path: Path, name: str, *candidates: str) -> Path:
    """Return `path` itself, or the first of `candidates` in it."""
    if path.is_file() and name not in _FOLDERS:
        return path
    found = next((path / candidate for candidate in candidates if (path / candidate).is_file()), None)
    if found is None:
        raise SourceError(f"{path} has no {' or '.join(candidates)}", hint=_expected(name))
    return found


_FOLDERS = ("safety", "glue", "anli", *BOSS)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read", cause=str(error)) from None


def _json(path: Path) -> Any:
    """Return one JSON value, or the list of JSON lines."""
    text = _text(path)
    if path.suffix == ".jsonl":
        return list(_lines(text, path))
    try:
        return json.loads(text)
    except ValueError as whole:
        lines = list(_lines(text, path)) if text.lstrip()[:1] == "{" else []
        if not lines:
            raise SourceError(f"{path} is not JSON", cause=str(whole)) from None
        return lines


def _lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SourceError(f"{path}:{number} is not JSON", cause=str(error)) from None


def _label(value: object, name: str, where: str, words: Mapping[str, int]) -> int:
    text = str(value)
    if text in words:
        return words[text]
    if re.fullmatch("-?[0-9]{1,9}", text):
        return int(text)
    raise SourceError(f"{where}: column 'label' is {value!r}, none of the task's answers", hint=_expected(name))


def _require(name: str, where: str, row: object, columns: Sequence[str]) -> None:
    for column in columns:
        if not isinstance(row, Mapping) or column not in row:
            raise _lacks(name, where, column, row)


def _lacks(name: str, where: str, column: str, row: object) -> SourceError:
    has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    return SourceError(f"{where} has no {column!r}", cause=f"it has {has[:200]}", hint=_expected(name))


def _expected(name: str) -> str:
    return f"benchmark {name} is read from {BENCHMARKS[name].files}"
