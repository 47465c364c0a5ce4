"""TruthfulQA as its authors publish it, as the hub has it and as BIG-bench does: one set of items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.benchmark_files import read_benchmark
from orchestrator.errors import SourceError

QUESTION, BEST = "Is the moon cheese?", "It is rock."
TRUE, FALSE = ["The moon is rock.", BEST, "No."], ["Yes.", "Only its far side."]
# Written out by hand: what both tasks ask.
MC1 = {"choices": ["It is rock.", "Yes.", "Only its far side."], "labels": [1, 0, 0]}
MC2 = {
    "choices": ["The moon is rock.", "It is rock.", "No.", "Yes.", "Only its far side."],
    "labels": [1, 1, 1, 0, 0],
}
BIG_BENCH = {
    "Question": QUESTION,
    "Category": "Moons",
    "True answers": TRUE,
    "False answers": FALSE,
    "Best answer": BEST,
}
PUBLISHED = {
    "question": QUESTION,
    "mc0_targets": {"It is rock.": 1, "Yes.": 0},
    "mc1_targets": {"It is rock.": 1, "Yes.": 0, "Only its far side.": 0},
    "mc2_targets": {"The moon is rock.": 1, "It is rock.": 1, "No.": 1, "Yes.": 0, "Only its far side.": 0},
}
HUB = {"question": QUESTION, "mc1_targets": MC1, "mc2_targets": MC2}
LAYOUTS: dict[str, tuple[str, Any]] = {
    "big-bench": ("questions.json", {"canary": "no text to train on", "prefix": "Q: ...", "examples": [BIG_BENCH]}),
    "published": ("mc_task.json", [PUBLISHED]),
    "hub": ("truthfulqa.jsonl", HUB),
}


def written(folder: Path, layout: str) -> Path:
    name, content = LAYOUTS[layout]
    (folder / name).write_text(json.dumps(content) + "\n")
    return folder / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_holds_the_same_items(layout: str, tmp_path: Path) -> None:
    path = written(tmp_path, layout)
    for source in (path, tmp_path):
        tasks = read_benchmark("truthfulqa", source)
        assert tasks == {
            task: {"validation": [{"question": QUESTION, "mc1_targets": MC1, "mc2_targets": MC2}]}
            for task in ("truthfulqa_mc1", "truthfulqa_mc2")
        }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"Best answer": "Nobody knows."}, "row 1: answers are lists of texts, the best one of them among the true"),
        ({"True answers": BEST}, "row 1: answers are lists of texts"),
        ({"True answers": 3}, "row 1: answers are lists of texts"),
        ({"False answers": [["Yes."]]}, "row 1: answers are lists of texts"),
        ({"False answers": [""]}, "row 1: mc1_targets has a choice without text"),
        ({"True answers": [BEST, " "]}, "row 1: mc2_targets has a choice without text"),
    ],
)
def test_answers_that_say_nothing_are_refused_with_their_row(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"examples": [BIG_BENCH | change]}))
    with pytest.raises(SourceError, match=said):
        read_benchmark("truthfulqa", path)


def test_a_label_beside_its_choice_is_zero_or_one(tmp_path: Path) -> None:
    path = tmp_path / "mc_task.json"
    path.write_text(json.dumps([PUBLISHED | {"mc2_targets": {"It is rock.": 1, "Yes.": "0"}}]))
    with pytest.raises(SourceError, match="row 1: mc2_targets needs one label a choice, 0 or 1, and a true one"):
        read_benchmark("truthfulqa", path)


def test_a_file_of_other_json_is_refused_with_what_it_should_be(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": [BIG_BENCH]}))
    with pytest.raises(SourceError, match="has no 'examples'") as raised:
        read_benchmark("truthfulqa", path)
    assert "mc_task.json" in (raised.value.hint or "")
