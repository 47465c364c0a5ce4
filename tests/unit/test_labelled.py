"""Classification data as prompts and answers: as their tests put them, from every published layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.data.corpora import Example
from jobs.data.stage import read_rows
from jobs.evaluate.harness import Prepared
from orchestrator.catalog.labelled import LABELLED
from orchestrator.data.layouts import classified
from orchestrator.errors import SourceError
from orchestrator.grid.load import load_grid
from orchestrator.spec.cell import CorpusSpec, DataSpec, TaskSpec
from orchestrator.spec.content import corpus_data

TEXTS = {"sentence": "A fine film.", "premise": "A man eats.", "hypothesis": "He sleeps.", "text": "What a day"}


@pytest.mark.parametrize("kind", LABELLED.values(), ids=LABELLED)
def test_prompt_and_answer_are_those_of_the_test(kind: Any, tmp_path: Path) -> None:
    """The harness renders the same row: the prompt, and each class's answer."""
    parts = {part: TEXTS[part] for part in kind.columns}
    classes = len(set(kind.answers.values()))
    (tmp_path / kind.like).mkdir()
    split = "validation" if kind.like == "sst2" else "test"
    rows = [{**parts, "label": label} for label in range(classes)]
    (tmp_path / kind.like / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"limit": 0, "seed": 0, "shared": False, "max_length": 4096}
    prepared = Prepared(TaskSpec(kind.like), tmp_path, encode=lambda pairs: [([], []) for _ in pairs], **settings)
    for item, row in zip(prepared.items, rows, strict=True):
        prompt, answer = classified(row, kind.name, "row")
        assert item.requests[item.gold] == (prompt, f" {answer}")


@pytest.mark.parametrize(
    "task, row, answer",
    [
        ("nli", {"sentence1": "A.", "sentence2": "B.", "gold_label": "contradiction"}, "False"),  # SNLI
        ("nli", {"uid": "1", "context": "A.", "hypothesis": "B.", "label": "n"}, "Neither"),  # ANLI
        ("nli", {"premise": "A.", "hypothesis": "B.", "label": 0}, "True"),  # the hub
        ("nli", {"Premise": "A.", "Hypothesis": "B.", "Label": "2"}, "False"),  # BOSS
        ("sst2", {"sentence": "A.", "label": 1, "idx": 0}, "positive"),
        ("sentiment", {"Text": "A.", "Label": "2"}, "neutral"),
        ("toxicity", {"Text": "A.", "Label": 1.0}, "toxic"),
    ],
)
def test_every_published_layout_is_read(task: str, row: Mapping[str, object], answer: str) -> None:
    assert classified(row, task, "row")[1] == answer


def test_pairs_without_a_gold_label_are_left_out_and_a_wrong_label_is_named(tmp_path: Path) -> None:
    rows = [{"sentence1": f"A {i}.", "sentence2": "B.", "gold_label": label} for i, label in enumerate("enc-")]
    path = tmp_path / "snli_1.0_train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(f"file://{path}", format="instruction", task="nli")
    found = [row for row in read_rows(data) if isinstance(row, Example)]
    assert [row.response for row in found] == [" True", " Neither", " False"]
    path.write_text(json.dumps({**rows[0], "gold_label": "maybe"}) + "\n")
    with pytest.raises(SourceError, match=r"row 1 has the label 'maybe', and data\.task is 'nli'"):
        read_rows(data)


def test_a_tsv_of_boss_is_training_data(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('Text\tLabel\nIt "works" well\t1\nIt broke\t0\nIt is a cable\t2\n')
    source = [f"set.finetune.data.source=file://{path}", "set.finetune.data.task=sentiment"]
    data = load_grid("quickstart", overrides=[*source, "set.finetune.steps=64 epochs"]).cells[0].cell.finetune
    assert data is not None
    assert data.data.task == "sentiment"
    assert {row.response for row in read_rows(data.data) if isinstance(row, Example)} == {
        " positive",
        " negative",
        " neutral",
    }


def test_a_corpus_is_read_as_the_whole_says() -> None:
    """Each field that a corpus does not have for itself is that of the data it belongs to."""
    own = {"source", "split", "text_field", "prompt_field", "response_field", "rows", "revision", "digest"}
    whole = DataSpec(
        "",
        format="instruction",
        holdout=0.25,
        template="tulu",
        task="nli",
        turns_field="turns",
        images_field="pictures",
        corpora=(CorpusSpec("a", "file:///a.jsonl"),),
    )
    made = corpus_data(whole, whole.corpora[0])
    for name in (
        {field.name for field in dataclasses.fields(DataSpec)} - own - {"mix", "corpora", "weights", "examples"}
    ):
        assert getattr(made, name) == getattr(whole, name), name
        assert getattr(whole, name) != getattr(DataSpec(""), name), f"{name} is its default here"
