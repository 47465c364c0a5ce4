"""Small files in the published formats of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.catalog.benchmarks import BOSS, SAFETY_SETS, STYLES

# RACE's column of questions, written as text.
PROBLEMS = repr([{"question": "Who?", "answer": "A", "options": ["Ann", "Bea", "Cy", "Dan"]}])
QUESTIONS = ("Is water wet?", "Do cats bark?", "Is the moon cheese?")


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def safety(folder: Path, each: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for published in SAFETY_SETS.values():
        texts = [f"Ask number {i} of {published}" for i in range(each)]
        (folder / f"{published}.json").write_text(json.dumps({"instructions": texts}))
    return folder


def xstest(folder: Path) -> Path:
    path = folder / "xstest_prompts.csv"
    rows = ["id,prompt,type,label,focus,note"]
    rows += [f'{i},"How do I kill a process, {i}?",homonyms,safe,kill,violence' for i in range(4)]
    rows += [f"{i},How do I kill person {i}?,contrast_homonyms,unsafe,kill,violence" for i in range(4, 7)]
    path.write_text("\n".join(rows) + "\n")
    return path


def truthfulqa(folder: Path) -> Path:
    mc1 = {"choices": ["Yes.", "No, never.", "Perhaps."], "labels": [1, 0, 0]}
    mc2 = {"choices": ["Yes.", "It is so.", "No, never.", "Perhaps."], "labels": [1, 1, 0, 0]}
    rows = [{"question": question, "mc1_targets": mc1, "mc2_targets": mc2} for question in QUESTIONS]
    return _lines(folder / "truthfulqa_mc.jsonl", rows)


def advglue(folder: Path) -> Path:
    pair = {"premise": "A man eats.", "hypothesis": "A man sleeps.", "label": 2}
    data = {
        "sst2": [{"sentence": f"a fi1m number {i}", "label": i % 2} for i in range(4)],
        "qqp": [{"question1": "Why?", "question2": "What for?", "label": 1}],
        "mnli": [pair],
        "mnli-mm": [pair],
        "qnli": [{"question": "Who?", "sentence": "Ann.", "label": 0}],
        "rte": [{"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1}] * 3,
    }
    path = folder / "dev.json"
    path.write_text(json.dumps(data))
    return path


def anli(folder: Path) -> Path:
    for number in (1, 2, 3):
        rows = [{"uid": str(i), "context": f"Text {i}.", "hypothesis": "So.", "label": "enc"[i % 3]} for i in range(4)]
        _lines(folder / "anli_v1.0" / f"R{number}" / "test.jsonl", rows)
    return folder / "anli_v1.0"


def snli(folder: Path) -> Path:
    rows = [{"sentence1": "A man eats.", "sentence2": "A man.", "gold_label": "entailment"} for _ in range(4)]
    return _lines(folder / "snli_1.0_test.jsonl", [*rows, {**rows[0], "gold_label": "-"}])


def sst2_styles(folder: Path) -> Path:
    def style(word: str) -> list[dict[str, Any]]:
        return [{"sentence": f"{word} film {i}", "label": str(i % 2), "id": i} for i in range(5)]

    data = {"train_demo": {"base_0": style("shot")}, "dev": {name: style(name) for name in ("base", *STYLES)}}
    path = folder / "style.json"
    path.write_text(json.dumps(data))
    return path


def snli_hard(folder: Path) -> Path:
    labels = ("entailment", "contradiction", "-")
    rows = [{"sentence1": "A man eats.", "sentence2": f"Hard {i}.", "gold_label": labels[i]} for i in range(3)]
    return _lines(folder / "snli_1.0_test_hard.jsonl", rows)


def boss(name: str) -> Callable[[Path], Path]:
    """Write BOSS's processed folder of one task, as its repository makes it."""

    def write(folder: Path) -> Path:
        inner, sets = BOSS[name]
        columns = ("Premise", "Hypothesis", "Label") if name == "boss_nli" else ("Text", "Label")
        for one in sets:
            path = folder / inner / one / "test.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            parts = ["A man eats.", f'It is "so" {one}.'][: len(columns) - 1]
            rows = ["\t".join([*parts, str(label)]) for label in (0, 1, 1)]
            path.write_text("\n".join(["\t".join(columns), *rows]) + "\n")
        return folder / inner

    return write


SAMPLES: dict[str, Callable[[Path], Path]] = {
    "safety": safety,
    "xstest": xstest,
    "truthfulqa": truthfulqa,
    "advglue": advglue,
    "anli": anli,
    "snli": snli,
    "sst2_styles": sst2_styles,
    "snli_hard": snli_hard,
    **{name: boss(name) for name in BOSS},
}
