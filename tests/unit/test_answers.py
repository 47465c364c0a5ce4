"""An evaluation item that does not say which choice is right is refused with file, row and column, never scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jobs.data.item_files import item_blobs
from jobs.evaluate.harness import Prepared, load_config
from orchestrator.catalog.benchmarks import BENCHMARK_OF, BENCHMARKS, GLUE
from orchestrator.catalog.tasks import TASKS, splits_read
from orchestrator.data.answers import check
from orchestrator.data.benchmark_files import read_benchmark
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec, TaskSpec
from tests.benchmark_samples import SAMPLES

FOUR = {"text": ["red", "green", "blue", "grey"], "label": ["A", "B", "C", "D"]}
FIVE = {"text": [*FOUR["text"], "pink"], "label": [*FOUR["label"], "E"]}
PROBLEM = {"question": "Who came?", "answer": "B", "options": ["Ann", "Bea", "Cy", "Dan"]}
# task -> (a row, its label's column, the index of the right choice)
ROWS: dict[str, tuple[dict[str, Any], str, int]] = {
    "winogrande": (
        {"sentence": "Ann met Bea as _ was near.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "answer",
        1,
    ),
    "hellaswag": (
        {"activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "endings": ["eats.", "sings."], "label": "1"},
        "label",
        1,
    ),
    "arc_easy": ({"question": "Which?", "choices": FOUR, "answerKey": "C"}, "answerKey", 2),
    "arc_challenge": ({"question": "Which?", "choices": FOUR, "answerKey": "D"}, "answerKey", 3),
    "piqa": ({"goal": "sit", "sol1": "on a mat", "sol2": "no", "label": 1}, "label", 1),
    "mmlu": ({"question": "Which?", "subject": "anatomy", "choices": FOUR["text"], "answer": 3}, "answer", 3),
    "gsm8k": ({"question": "1 and 2?", "answer": "They are 3.\n#### 3"}, "answer", 0),
    "lambada_openai": ({"text": "the cat sat on the mat"}, "text", 0),
    "blimp": ({"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps.", "UID": "x"}, "sentence_good", 0),
    "cbt": (
        {"sentences": ["Once."], "question": "It was XXXXX .", "answer": "cat", "options": ["dog", "cat"]},
        "answer",
        1,
    ),
    "race": ({"article": "Bea came.", "problems": repr([PROBLEM])}, "problems", 1),
    "social_iqa": (
        {"context": "Ann ate.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "label",
        2,
    ),
    "commonsense_qa": ({"question": "Which?", "choices": FIVE, "answerKey": "E"}, "answerKey", 4),
    "openbookqa": ({"question_stem": "Which is", "choices": FOUR, "answerKey": "B"}, "answerKey", 1),
    "sciq": (
        {
            "question": "Q?",
            "support": "",
            **{f"distractor{i}": f"d{i}" for i in (1, 2, 3)},
            "correct_answer": "right",
        },
        "correct_answer",
        3,
    ),
    "boolq": ({"question": "is it", "passage": "It is.", "label": 1}, "label", 1),
}
# -1, "" and None say that there is no label; NaN is what a table makes of one that is missing.
NO_LABELS = [-1, "", None, math.nan, 5, -100, "Z", 1.0, [0], {"a": 1}, " "]
# task -> how its choices may be missing
NO_CHOICES = [
    ("winogrande", {"option2": ""}),
    ("winogrande", {"sentence": "There is no blank."}),
    ("hellaswag", {"endings": []}),
    ("hellaswag", {"endings": ["eats.", "[header]"]}),
    ("arc_easy", {"choices": {"text": [], "label": []}}),
    ("arc_challenge", {"choices": {"text": ["a"], "label": ["D", "E"]}}),
    ("openbookqa", {"choices": {"text": ["a", None], "label": ["A", "B"]}}),
    ("piqa", {"sol1": ""}),
    ("piqa", {"sol2": None}),
    ("mmlu", {"choices": []}),
    ("mmlu", {"choices": ["a", "b", "c"]}),
    ("commonsense_qa", {"choices": FOUR}),
    ("social_iqa", {"answerC": " "}),
    ("race", {"problems": "[]"}),
    ("race", {"problems": repr([{**PROBLEM, "options": []}])}),
    ("race", {"problems": repr([{**PROBLEM, "answer": ""}, PROBLEM])}),
    ("cbt", {"options": []}),
    ("cbt", {"question": "no blank"}),
    ("blimp", {"sentence_bad": ""}),
    ("sciq", {"distractor2": ""}),
    ("lambada_openai", {"text": "word"}),
    ("lambada_openai", {"text": "the cat sat "}),
    ("piqa", {"goal": None}),
    ("mmlu", {"question": 3}),
]


def _folder(folder: Path, task: str, rows: list[dict[str, Any]], split: str = "") -> DataSpec:
    path = folder / task / f"{split or TASKS.get(task).splits[0]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(f"file://{folder}", format="items")


def _words(requests: Any) -> list[Any]:
    return [([0] * (1 + len(a.split())), [0] * len(b.split())) for a, b in requests]


def _prepared(folder: Path, task: str) -> Prepared:
    return Prepared(TaskSpec(task), folder, limit=0, seed=0, shared=False, max_length=4096, encode=_words)


def test_every_task_has_a_rule_and_the_splits_of_the_harness() -> None:
    assert set(ROWS) == set(TASKS.builtins)
    for task, (evaluated, *shots) in ((name, kind.splits) for name, kind in TASKS.builtins.items()):
        config = load_config(task)
        assert evaluated == (config.get("test_split") or config.get("validation_split"))
        named = (config.get(f"{name}_split") for name in ("fewshot", "training", "validation"))
        assert shots == [split for split in dict.fromkeys(named) if split and split != evaluated]


@pytest.mark.parametrize("task", ROWS)
def test_a_label_that_passes_is_the_choice_that_the_harness_takes(task: str, tmp_path: Path) -> None:
    row, _, gold = ROWS[task]
    blobs, _ = item_blobs(_folder(tmp_path, task, [row, row]), [task])
    assert blobs[f"{task}/{TASKS.get(task).splits[0]}.jsonl"] == (json.dumps(row) + "\n").encode() * 2
    assert [item.gold for item in _prepared(tmp_path, task).items] == [gold, gold]


@pytest.mark.parametrize("value", NO_LABELS, ids=repr)
@pytest.mark.parametrize("task", ROWS)
def test_an_item_without_a_right_answer_is_refused_by_file_row_and_column(
    task: str, value: Any, tmp_path: Path
) -> None:
    row, column, _ = ROWS[task]
    if value == "Z" and task in ("blimp", "sciq"):
        pytest.skip("the label is the text itself")
    data = _folder(tmp_path, task, [row, {**row, column: value}])
    place = f"{tmp_path}/{task}/{TASKS.get(task).splits[0]}.jsonl, row 2: column '{column}' of task '{task}'"
    with pytest.raises(SourceError) as raised:
        item_blobs(data, [task])
    assert raised.value.error.startswith(place)
    assert "leave it out" in raised.value.hint


@pytest.mark.parametrize("task, changed", NO_CHOICES, ids=str)
def test_an_item_without_choices_is_refused_by_file_row_and_column(
    task: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    (column,) = changed
    data = _folder(tmp_path, task, [{**ROWS[task][0], **changed}])
    with pytest.raises(SourceError, match=rf"\.jsonl, row 1: column '{column}' of task '{task}'"):
        item_blobs(data, [task])


def test_shots_are_checked_and_splits_that_nobody_reads_are_not(tmp_path: Path) -> None:
    row = ROWS["piqa"][0]
    data = _folder(tmp_path, "piqa", [row])
    _folder(tmp_path, "piqa", [{**row, "label": -1}], "test")
    assert item_blobs(data, ["piqa"])[1] == {"piqa": {"test": 1, "validation": 1}}
    _folder(tmp_path, "piqa", [{**row, "label": -1}], "train")
    with pytest.raises(SourceError, match=r"piqa/train\.jsonl, row 1: column 'label'"):
        item_blobs(data, ["piqa"])
    assert splits_read("arc_easy", ("validation", "test")) == ("test", "validation")
    assert splits_read("arc_easy", ("validation", "test", "train")) == ("test", "train")


def test_rows_of_several_types_are_refused_while_data_are_prepared(tmp_path: Path) -> None:
    row = ROWS["piqa"][0]
    data = _folder(tmp_path, "piqa", [row, {**row, "label": row["sol1"]}])
    with pytest.raises(SourceError, match="column 'label' of task 'piqa', split 'validation', has values of several"):
        item_blobs(data, ["piqa"])


@pytest.mark.parametrize("changed", [{"label": -1}, {"label": 2}, {"label": "Z"}, {"label": 0, "sol1": ""}], ids=str)
def test_items_of_an_older_store_are_not_scored_without_a_right_answer(changed: dict[str, Any], tmp_path: Path) -> None:
    row = ROWS["piqa"][0]
    for first in ([row], []):
        if first and changed["label"] == "Z":
            continue  # a column of two types
        _folder(tmp_path, "piqa", [*first, {**row, **changed}])
        with pytest.raises(SourceError, match="task 'piqa', split 'validation'"):
            _prepared(tmp_path, "piqa")


def _glue_folder(folder: Path) -> Path:
    pair = dict.fromkeys(("premise", "hypothesis", "sentence", "sentence1", "sentence2"), "x")
    rows = [{**pair, "question": "x", "question1": "x", "question2": "x", "label": i} for i in (0, 1)]
    folder.mkdir()
    for task in GLUE:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("value", [-1, "", None, math.nan, 3, "Z", 1.5, [0]], ids=repr)
@pytest.mark.parametrize("name", ["glue", "advglue", "sst2_styles", "anli", "truthfulqa", "xstest", "nq_open"])
def test_a_benchmarks_file_without_a_right_answer_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    if name == "nq_open":
        path = tmp_path / "nq_open.jsonl"
        path.write_text(json.dumps({"question": "Who?", "answer": value}) + "\n")
        if value == "Z":
            pytest.skip("any text is an answer")
    elif name == "truthfulqa":
        path = tmp_path / "truthfulqa.jsonl"
        targets = {"choices": ["a", "b"], "labels": [1, value]}
        path.write_text(json.dumps({"question": "Q", "mc1_targets": targets, "mc2_targets": targets}) + "\n")
    elif name == "xstest":
        path = tmp_path / "xstest.jsonl"
        path.write_text(json.dumps({"prompt": "How?", "type": "homonyms", "label": value}) + "\n")
    else:
        path = _glue_folder(tmp_path / "glue") if name == "glue" else SAMPLES[name](tmp_path)
        file = {"glue": path / "sst2.jsonl", "anli": path / "R2" / "test.jsonl"}.get(name, path)
        old = '"label": "n"' if name == "anli" else '"label": "1"' if name == "sst2_styles" else '"label": 1'
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, f'"label": {json.dumps(value)}', 1))
    with pytest.raises(SourceError, match=r"row \d+.*(label|answer|targets)"):
        read_benchmark(name, path)


def test_every_scored_task_of_a_benchmark_has_a_rule() -> None:
    own = ("truthfulqa_mc1", "truthfulqa_mc2", *BENCHMARKS["safety"].tasks, "xstest")
    pairs = ("question", "question1", "question2", "premise", "hypothesis", "sentence1", "sentence2")
    texts = ("sentence", "text", *pairs)
    row = dict.fromkeys(texts, "x")
    for task in (task for task in BENCHMARK_OF if task not in own):
        with pytest.raises(SourceError, match=f"column '(label|answer)' of task '{task}'"):
            check(task, {**row, "label": -1, "answer": -1}, "file, row 1")
