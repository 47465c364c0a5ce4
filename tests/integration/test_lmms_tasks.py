"""lmms-eval's benchmarks out of its wheel: rows of their columns are read, asked and scored by its own functions."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.data.images import digest_of, opened
from jobs.evaluate.lmms_tasks import _distance, benchmark
from orchestrator.catalog.lmms import LMMS_TASKS
from orchestrator.errors import GridError, SourceError
from orchestrator.grid.load import load_grid
from orchestrator.spec.cell import DataSpec, TaskSpec, TokenizerSpec
from orchestrator.spec.resolve import before_upcycling, text_part
from orchestrator.spec.work import DataWork, EvaluateWork, InitWork, TokenizerWork
from orchestrator.store import Store
from tests.integration.stages import run_stages
from tests.picture_samples import picture
from tests.seeing import SEES

RED = picture((200, 0, 0), (8, 8))
# One row a task, made up in the columns of lmms-eval's own data sets; `shown` stands for the picture.
ROWS: dict[str, dict[str, Any]] = {
    "ai2d": {"image": "shown", "question": "Which one eats?", "options": ["sun", "fox"], "answer": "1"},
    "textvqa_val": {"image": "shown", "question": "what is written?", "question_id": 1, "answers": ["stop"] * 10},
    "gqa": {"image": "shown", "question": "Is it red?", "answer": "yes", "imageId": "1"},
    "mmbench_en_dev": {
        "image": "shown", "question": "Which?", "answer": "A", "A": "cat", "B": "dog", "category": "c",
        "L2-category": "l", "index": 1, "hint": "nan", "source": "s", "split": "dev",
    },
    "hallusion_bench_image": {"image": "shown", "question": "Is it round?", "gt_answer_details": "No."},
    "mathvista_testmini_format": {
        "decoded_image": "shown", "image": "images/1.jpg", "question": "How many?", "question_type": "free_form",
        "answer_type": "integer", "choices": None, "answer": "3", "unit": None, "precision": None, "query": "How many?",
    },
    "mmmu_val": {
        "id": "validation_Art_1", "image_1": "shown", "question": "Who drew <image 1>?", "options": "['Goya', 'Klee']",
        "question_type": "multiple-choice", "answer": "B",
    },
    "mmstar": {
        "image": "shown", "question": "Which? Options: A: one, B: two", "answer": "B", "category": "math",
        "l2_category": "geometry", "index": 0,
    },
    "pope": {"image": "shown", "question": "Is there a cat?", "answer": "yes", "question_id": "1"},
    "mme": {"image": "shown", "question": "Is it a cat? Please answer yes or no.", "answer": "Yes", "question_id": "a",
            "category": "existence"},
    "mmerealworld": {
        "bytes": base64.b64encode(RED).decode(), "question": "What?", "multi-choice options": ["(A) cat", "(B) dog"],
        "answer": "B", "category": "Perception/OCR with Complex Context", "l2-category": "text", "index": 0,
    },
    "ocrbench": {"image": "shown", "question": "what is written?", "answer": ["STOP"], "dataset": "x",
                 "question_type": "Regular Text Recognition"},
}  # fmt: skip
RIGHT = {
    "ai2d": "B. fox", "textvqa_val": "Stop.", "gqa": "Yes.", "mmmu_val": "B", "mmstar": "B", "pope": "Yes",
    "mme": "yes", "mmerealworld": "B", "ocrbench": "it says stop here",
}  # fmt: skip


def doc_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: opened(RED, name) if value == "shown" else value for name, value in row.items()}


@pytest.mark.parametrize("name", list(LMMS_TASKS))
def test_a_row_of_every_benchmark_is_asked_and_scored(name: str) -> None:
    task, row = benchmark(name), ROWS[name]
    assert {*ROWS} == {*LMMS_TASKS}
    text = task.text(doc_of(row))
    assert row["question"].split()[0].lower() in text.lower()
    (shown,) = task.pictures(doc_of(row))
    assert (shown.mode, shown.size) == ("RGB", (8, 8))
    if not task.task.scores:
        assert task.task.judged
        return
    docs = [doc_of(row) for _ in range(2)]
    good, bad = (task.scored([*map(dict, docs)], [answer] * 2) for answer in (RIGHT[name], "A"))
    assert set(good) <= set(task.task.scores)
    assert good
    first = next(iter(good))
    assert good[first] > bad[first] == 0.0


def test_what_is_drawn_and_counted_depends_on_the_answers_alone() -> None:
    docs = [doc_of({**ROWS["mmmu_val"], "id": f"validation_Art_{number}"}) for number in range(20)]
    scores = [benchmark("mmmu_val").scored(docs, ["none of them"] * 20)["mmmu_acc"] for _ in range(3)]
    assert 0 < scores[0] < 1
    assert len(set(scores)) == 1, "an option is drawn for each"
    twice = [benchmark("ocrbench").scored([doc_of(ROWS["ocrbench"])], ["stop"]) for _ in range(2)]
    assert twice[0] == twice[1] == {"ocrbench_accuracy": 1 / 1000}


def test_popes_scores_are_those_of_its_formulas() -> None:
    truth = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
    said = ["Yes", "no", "yes ", "no", "yes", "No", "maybe", "yes"]
    docs = [{**ROWS["pope"], "answer": answer, "question_id": str(n)} for n, answer in enumerate(truth)]
    found = benchmark("pope").scored(docs, said)
    right = sum(one == two.lower().strip() for one, two in zip(truth, said, strict=True))
    both, of_said, of_true = 3, 4, 4  # rightly yes; said yes; truly yes
    assert found["pope_accuracy"] == pytest.approx(right / 8)
    assert found["pope_precision"] == pytest.approx(both / of_said)
    assert found["pope_recall"] == pytest.approx(both / of_true)
    assert found["pope_f1_score"] == pytest.approx(2 * both / (of_said + of_true))
    assert found["pope_yes_ratio"] == pytest.approx(0.5)


def test_mmes_scores_are_sums_over_categories_of_both_accuracies() -> None:
    def row(category: str, question: str, answer: str) -> dict[str, Any]:
        return {**ROWS["mme"], "category": category, "question_id": question, "answer": answer}

    docs = [row("count", "a", "Yes"), row("count", "a", "No"), row("count", "b", "Yes"), row("count", "b", "No")]
    docs += [
        row("OCR", "c", "Yes"),
        row("OCR", "c", "No"),
        row("code_reasoning", "d", "Yes"),
        row("code_reasoning", "d", "No"),
    ]
    said = ["yes", "no", "yes", "yes", "Yes.", "No, it is not", "no", "no"]
    found = benchmark("mme").scored(docs, said)
    # count: (100 + 100 + 50 + 0) / 2; OCR: 100 + 100; code reasoning: 50 + 0.
    assert found == {"mme_perception_score": 125.0 + 200.0, "mme_cognition_score": 50.0}
    with pytest.raises(SourceError, match="mme_aggregate_results does not take the rows"):
        benchmark("mme").scored(docs[:1], said[:1])


def test_what_a_row_lacks_is_told() -> None:
    with pytest.raises(SourceError, match="has no column 'question'") as error:
        benchmark("pope").text({"image": 1})
    assert "pope_doc_to_text reads it" in error.value.cause


def test_the_distance_of_words_is_levenshteins() -> None:
    assert [_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("a", "a"))] == [
        3,
        3,
        2,
        0,
    ]


def test_a_state_is_asked_and_every_answer_is_kept(tmp_path: Path) -> None:
    for name in ("pope", "mathvista_testmini_format", "mmmu_val"):
        (tmp_path / "rows" / name).mkdir(parents=True)
        rows = []
        for number in range(4):
            (tmp_path / "rows" / f"{number}.png").write_bytes(picture((50 * number, 0, 0), (8, 8)))
            row = {**ROWS[name], "question_id": str(number), "id": f"validation_Art_{number}"}
            shown = {"bytes": None, "path": f"{number}.png"}
            row = {key: shown if value == "shown" else value for key, value in row.items()}
            if name == "mmmu_val" and number == 3:
                row |= {"question": "<image 1> or <image 2>?", "image_2": shown}
            rows.append(row)
        split = benchmark(name).split
        (tmp_path / "rows" / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{n} yes no {n * n}"}) for n in range(200)))
    store = Store.open(str(tmp_path / "store"))
    tasks = ("mathvista_testmini_format", "mmmu_val", "pope")
    text = DataWork(DataSpec(f"file://{tmp_path}/text.jsonl", digest="ab"), 0)
    tokenizer = TokenizerWork(TokenizerSpec(vocab_size=300), text.key())
    items = DataWork(DataSpec(f"file://{tmp_path}/rows", format="items", digest="cd", holdout=0.0), 0, tasks)
    first = InitWork(text_part(SEES), tokenizer.key(), 0)
    seeing = InitWork(before_upcycling(SEES), tokenizer.key(), 0, "", first.key())
    asked = EvaluateWork(
        "lmms_eval", seeing.key(), before_upcycling(SEES), tokenizer.key(), items.key(), "",
        tasks=tuple(TaskSpec(task, 0) for task in tasks), max_length=24, benchmark="table1",
    )  # fmt: skip
    *_, made = run_stages(store, [text, tokenizer, items, first, seeing, asked])
    told = made.info["tasks"]
    assert {task: one["rows"] for task, one in told.items()} == {tasks[0]: 4, tasks[1]: 3, tasks[2]: 4}
    assert told["mmmu_val"]["several_pictures"] == 1
    assert told["mathvista_testmini_format"]["judged"] == ["llm_as_judge_eval"]
    (blob,) = made.blobs
    answers = pq.read_table(io.BytesIO(store.artifacts.read(blob))).to_pylist()
    assert len(answers) == 11
    pope = [row["response"].strip().lower() for row in answers if row["task"] == "pope"]
    assert made.metrics["table1/pope/pope_accuracy"] == sum(answer == "yes" for answer in pope) / 4
    assert set(made.metrics) == {
        "table1/mmmu_val/mmmu_acc", *(f"table1/pope/{name}" for name in LMMS_TASKS["pope"].scores)
    }  # fmt: skip
    assert digest_of(picture((0, 0, 0), (8, 8))) not in str(answers)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("tasks: [popes], protocol: lmms_eval", "task 'popes' is no question about pictures"),
        ("tasks: [pope], protocol: lmms", "'lmms'"),
        ("tasks: [pope]", "no questions about pictures for the suite lmms_eval to ask"),
        (
            'source: "npm://emoji-datasource-google@16.0.0/items", tasks: [pope], protocol: lmms_eval',
            "holds questions of ours",
        ),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_runs(tmp_path: Path, change: str, error: str) -> None:
    folder = tmp_path / "rows" / "pope"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps({"question": "Is it?", "answer": "yes"}))
    one = change if "source" in change else f'source: "file://{tmp_path}/rows", {change}'
    with pytest.raises(GridError, match=error):
        load_grid("quickstart_vlm", overrides=["evaluate=[lmms_eval]", f"set.evaluate.pictures.bench={{{one}}}"])
