"""An own lm-eval task beside a grid: found, checked, carried to the node and scored; answers that are generated too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.evaluate.harness import Prepared
from orchestrator.catalog.tasks import TASKS
from orchestrator.errors import GridError
from orchestrator.grid.columns import columns_of
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import TaskSpec
from orchestrator.spec.work import EvaluateWork
from orchestrator.store import Store
from tests.small_grid import GRID, made_up_text, moegrid

CHOICES = """task: my_arith
dataset_path: json
dataset_kwargs: {data_files: my_eval.jsonl}
output_type: multiple_choice
test_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATED = """task: my_sums
dataset_path: json
dataset_kwargs: {data_files: my_eval.jsonl}
output_type: generate_until
test_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], do_sample: false}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "(-?[0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROWS = [{"question": f"What is {n} plus 1?", "choices": [str(n + 1), str(n + 2)], "gold": 0} for n in range(12)]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    known = dict(TASKS.outside)
    yield
    TASKS.outside.clear()
    TASKS.outside.update(known)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("my_arith.yaml", CHOICES), ("my_sums.yaml", GENERATED)):
        (tmp_path / name).write_text(text)
    (tmp_path / "my_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def load(folder: Path, tasks: str, more: str = "") -> Grid:
    path = folder / "g.yaml"
    path.write_text(
        f"name: g\nbase: finetune\nevaluate: [lm, reasoning]\nfactors: {{seed: [0]}}\n{more}\n"
        f"set: {{evaluate.tasks: {{winogrande: false, hellaswag: false, arc_easy: false, arc_challenge: false, "
        f"piqa: false, mmlu: false, {tasks}}}}}\n"
    )
    return load_grid(str(path))


def reasoning(grid: Grid) -> EvaluateWork:
    works = [stage.work for stage in build_graph(grid).stages.values()]
    return next(work for work in works if isinstance(work, EvaluateWork) and work.suite == "reasoning")


@pytest.mark.parametrize(
    ("tasks", "more"),
    [
        ("my_arith: {limit: 5}", ""),
        ("my_arith: {limit: 5}", "plugins: [./my_arith.yaml]"),
        ("./my_arith.yaml: {limit: 5}", ""),
    ],
)
def test_a_task_file_is_named_beside_the_grid_or_by_its_path(folder: Path, tasks: str, more: str) -> None:
    grid = load(folder, tasks, more)
    (task,) = grid.cells[0].cell.evaluate.tasks
    assert (task.name, task.limit, task.source) == ("my_arith", 5, f"file://{folder}/my_eval.jsonl")
    assert {"my_arith/acc", "my_arith/answer_bpb"} <= columns_of(grid.cells[0].cell)
    assert reasoning(grid).new_tokens == 0


def test_text_and_items_of_the_task_are_in_its_keys_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    first = reasoning(load(folder, "my_arith: {}"))
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    TASKS.outside.clear()
    assert reasoning(load(elsewhere, "my_arith: {}")).key() == first.key()
    (folder / "my_arith.yaml").write_text(CHOICES.replace("Q:", "Question:"))
    TASKS.outside.clear()
    text = reasoning(load(folder, "my_arith: {}"))
    assert text.key() != first.key()
    (folder / "my_arith.yaml").write_text(CHOICES)
    (folder / "my_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:9]))
    TASKS.outside.clear()
    assert reasoning(load(folder, "my_arith: {}")).key() not in (first.key(), text.key())


def test_the_harness_makes_its_requests_and_compares_its_answers(folder: Path) -> None:
    load(folder, "my_arith: {}, my_sums: {}")
    for task in ("my_arith", "my_sums"):
        (folder / "items" / task).mkdir(parents=True)
        shutil.copy(folder / "my_eval.jsonl", folder / "items" / task / "train.jsonl")

    def made(task: str) -> Prepared:
        def encode(pairs: object) -> list[tuple[list[int], list[int]]]:
            return [([0], [0]) for _ in pairs]  # type: ignore[attr-defined]

        spec = TaskSpec(task)
        return Prepared(spec, folder / "items", limit=0, seed=1, shared=False, max_length=99, encode=encode)

    scored, generated = made("my_arith"), made("my_sums")
    assert scored.items[1].requests == (("Q: What is 1 plus 1?\nA:", " 2"), ("Q: What is 1 plus 1?\nA:", " 3"))
    assert generated.generation == {"until": ["\n"], "do_sample": False}
    item = generated.items[4]
    assert [generated.match(item, text) for text in (" it is 5.", "5", "4", "none")] == [1.0, 1.0, 0.0, 0.0]


def test_gsm8k_is_compared_by_its_final_number(folder: Path) -> None:
    rows = [{"question": f"{n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    (folder / "items" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "items" / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def encode(pairs: object) -> list[tuple[list[int], list[int]]]:
        return [([0], [0]) for _ in pairs]  # type: ignore[attr-defined]

    spec = TaskSpec("gsm8k", shots=2)
    task = Prepared(spec, folder / "items", limit=0, seed=1, shared=False, max_length=99, encode=encode)
    assert task.items[0].requests[0][0].count("Question:") == 3
    assert [task.match(task.items[0], text) for text in ("so\n#### 1", "so 1", "#### 2")] == [1.0, 0.0, 0.0]
    source = f"gsm8k: {{source: 'file://{folder}/items', shots: 2}}"
    work = reasoning(load(folder, source))
    assert work.new_tokens == 64
    assert "gsm8k/exact_match" in columns_of(load(folder, source).cells[0].cell)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("task: my_arith", "tusk: x"), "does not say its task"),
        (("multiple_choice", "loglikelihood_rolling"), "output_type 'loglikelihood_rolling'.*one of multiple_choice"),
        (("test_split: train\n", ""), "names no test_split"),
        (("my_eval.jsonl", "gone.jsonl"), "gone.jsonl.* does not exist"),
        (("{{question}}", "{{quesion}}"), "row 1 has no column 'quesion'"),
        (("doc_to_target: gold", "doc_to_target: !function utils.gold"), "needs the code of another file"),
        (("task: my_arith", "include: base.yaml\ntask: my_arith"), "includes 'base.yaml'"),
        (("multiple_choice", "generate_until"), "not compared by exact_match"),
        (("task: my_arith", "task: [my_arith"), "my_arith.yaml:"),
    ],
)
def test_what_is_wrong_with_a_task_file_is_told_with_its_place(
    folder: Path, change: tuple[str, str], said: str
) -> None:
    (folder / "my_arith.yaml").write_text(CHOICES.replace(*change))
    with pytest.raises(GridError) as caught:
        load(folder, "my_arith: {}")
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_choices_are_scored_where_some_tasks_generate(folder: Path) -> None:
    with pytest.raises(GridError, match="the suites efficiency score choices, and every task generates"):
        load_grid(str(load(folder, "my_sums: {}").path), overrides=["evaluate=[reasoning,efficiency]"])
    both = load(folder, "my_sums: {}, my_arith: {}")
    grid = load_grid(str(both.path), overrides=["evaluate=[reasoning,efficiency]", "at=[1.0]"])
    works = [stage.work for stage in build_graph(grid).stages.values() if isinstance(stage.work, EvaluateWork)]
    tasks = {work.suite: {task.name for task in work.tasks} for work in works}
    assert tasks == {"reasoning": {"my_sums", "my_arith"}, "efficiency": {"my_arith"}}


def test_a_run_scores_and_generates(folder: Path) -> None:
    made_up_text(folder)
    text = GRID.format(at="[1.0]", folder=folder).replace("evaluate: [lm]", "evaluate: [lm, reasoning]")
    text = text.replace("{freeze: [none, none->router]}", "{freeze: [none]}")
    assert "reasoning" in text
    text += "  evaluate.tasks: {my_arith: {limit: 6}, my_sums: {limit: 4}, winogrande: false, hellaswag: false, "
    text += "arc_easy: false, arc_challenge: false, piqa: false, mmlu: false}\n  evaluate.generation.new_tokens: 6\n"
    (folder / "small.yaml").write_text(text)
    moegrid("run", str(folder / "small.yaml"), "--store", str(folder / "store"), "--tracking", "none")
    opened = Store.peek(str(folder / "store"))
    manifests = opened.artifacts.many(opened.artifacts.keys()).values()
    (found,) = [manifest for manifest in manifests if "my_sums/exact_match" in manifest.metrics]
    assert 0.0 <= found.metrics["my_arith/acc"] <= 1.0
    assert found.metrics["answer_bpb"] == found.metrics["my_arith/answer_bpb"]
    mean = (found.metrics["my_arith/acc"] + found.metrics["my_sums/exact_match"]) / 2
    assert found.metrics["reasoning_avg"] == pytest.approx(mean)
    assert {blob.name for blob in found.blobs} == {"items.parquet", "responses.parquet"}
    assert {use["provider"] for use in found.provenance["plugins"]} == {"my_arith.yaml", "my_sums.yaml"}
