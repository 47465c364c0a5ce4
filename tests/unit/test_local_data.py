"""The head of every local data file is read when a grid is loaded, and an epoch is the examples that training sees."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.data.corpora import Example
from jobs.data.packing import _Order
from jobs.data.stage import check_epoch, mixed_rows, parquet, read_rows, split_rows
from orchestrator.data.local_data import HEAD, training_examples
from orchestrator.data.pinning import pin
from orchestrator.errors import GridError, SourceError
from orchestrator.grid.load import Grid
from orchestrator.plan.stages import constant_part
from orchestrator.spec.cell import DataSpec, MixSpec, TrainSpec
from orchestrator.spec.identity import digest
from orchestrator.spec.units import parse_length
from tests.benchmark_samples import PROBLEMS

Load = Callable[..., Grid]
PIQA = {"goal": "sit", "sol1": "on a mat", "sol2": "no", "label": 0}


def _rows(count: int) -> str:
    return "".join(json.dumps({"prompt": f"Say {i}", "response": f"{i}."}) + "\n" for i in range(count))


def _finding(load: Load, text: str) -> str:
    with pytest.raises(GridError) as raised:
        load(text)
    (problem,) = raised.value.problems
    assert problem.hint, problem
    assert "grid.yaml:" in problem.where
    return problem.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "d.jsonl, row 2 has no column 'response'"),
        ("d.jsonl", b'{"prompt": "a", "response": 3}\n', "column 'response' of PATH/d.jsonl, row 1 is int, not text"),
        ("d.jsonl", b'{"prompt": "a", "response": null}\n', "row 1 is NoneType, not text"),
        ("d.jsonl", b'{"prompt": "a", "resp', "d.jsonl:1 is not JSON"),
        ("d.jsonl", b'"a text"\n', "d.jsonl:1 is str, not an object"),
        ("d.jsonl", b'{"prompt": "\xff\xfe"}\n', "d.jsonl:1 is not JSON"),
        ("d.jsonl", b"", "has no rows"),
        ("d.jsonl", b"\n\n", "has no rows"),
        ("d.json", b"[]", "has no rows"),
        ("d.json", b'{"prompt": "a",\n "response": "b"}\n', "d.json:1 is not JSON"),
        ("d.json", b"[1, 2]", "d.json, row 1 is int, not an object"),
        ("d.csv", b"prompt,response\na,b\n", "d.csv has an unknown format"),
        ("d.jsonl.gz", b"\x1f\x8b", "d.jsonl.gz has an unknown format"),
        ("d.parquet", b"PAR1 no", "d.parquet is not a Parquet file"),
        ("d.parquet", b"", "d.parquet is not a Parquet file"),
        ("d.parquet", parquet([Example("x", "y", "a", " b")]), "leaves no training rows"),
        ("folder/.keep", b"", "folder/.keep has an unknown format"),
        ("folder/inner/d.jsonl", _rows(3).encode(), "folder has no rows"),
        ("folder/d.md", b"\xff", "folder/d.md is not UTF-8"),
    ],
)
@pytest.mark.parametrize("where", ["finetune.data", "finetune.data.mix"])
def test_a_file_that_the_node_could_not_read_is_refused_by_the_plan(
    load: Load, tmp_path: Path, where: str, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if where.endswith("mix") and "no training rows" in message:
        pytest.skip("mixed-in rows are not held out")
    source = f"file://{name.partition('/')[0]}"
    fields = "prompt_field: prompt, response_field: response, rows: 1" if where.endswith("mix") else "rows: 0"
    found = _finding(load, f"set: {{{where}: {{source: '{source}', {fields}}}}}\n")
    assert message.replace("PATH", str(tmp_path)) in found
    # The node says the same of what it reads.
    data = DataSpec(f"file://{tmp_path}/{name.partition('/')[0]}", format="instruction")
    if "training rows" not in message:
        with pytest.raises(SourceError):
            read_rows(data)


def test_a_fault_behind_the_head_is_left_to_the_node(load: Load, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(_rows(HEAD + 1) + "no JSON\n")
    assert load("set: {finetune.data.source: 'file://d.jsonl'}\n").cells


def test_too_few_examples_to_mix_in_are_refused_by_the_plan(load: Load, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(_rows(5) * 2)
    mix = "source: 'file://d.jsonl', prompt_field: prompt, response_field: response"
    assert load(f"set: {{finetune.data.mix: {{{mix}, rows: 5}}}}\n").cells
    found = _finding(load, f"set: {{finetune.data.mix: {{{mix}, rows: 6}}}}\n")
    assert "has 5 different examples, not 6" in found


ITEMS: list[tuple[dict[str, str], str, str]] = [
    ({"piqa/validation.jsonl": json.dumps({**PIQA, "label": -1})}, "", "row 1: column 'label' of task 'piqa' is -1"),
    ({"piqa/validation.jsonl": json.dumps({"goal": "sit"})}, "", "validation.jsonl, row 1 has no column 'sol1'"),
    ({"piqa/validation.jsonl": ""}, "", "has no items of task 'piqa', split 'validation'"),
    ({"piqa/validation.jsonl": "{"}, "", "piqa/validation.jsonl:1 is not JSON"),
    ({"piqa/test.jsonl": json.dumps(PIQA)}, "", "has no piqa/validation.jsonl: that split is evaluated"),
    ({"other.jsonl": json.dumps(PIQA)}, "", "has no items of task 'piqa'"),
    ({"piqa.jsonl": json.dumps(PIQA)}, "shots: 2", "has no split to draw 2 shots of task 'piqa' from"),
    (
        {"piqa/validation.jsonl": json.dumps(PIQA), "piqa/train.jsonl": json.dumps(PIQA)},
        "shots: 2",
        "1 rows of task 'piqa', split 'train', are too few for 2 shots",
    ),
    (
        {"piqa/validation.jsonl": json.dumps(PIQA), "piqa/train.jsonl": json.dumps({**PIQA, "label": ""})},
        "shots: 1",
        "piqa/train.jsonl, row 1: column 'label' of task 'piqa' is ''",
    ),
]


@pytest.mark.parametrize(("files", "task", "message"), ITEMS, ids=[message for *_, message in ITEMS])
@pytest.mark.parametrize("own", [True, False])
def test_items_that_could_not_be_evaluated_are_refused_by_the_plan(
    load: Load, tmp_path: Path, own: bool, files: dict[str, str], task: str, message: str
) -> None:
    for name, content in files.items():
        (tmp_path / "items" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "items" / name).write_text(content + "\n")
    fields = ", ".join(filter(None, ["source: 'file://items'" if own else "", task or "shots: 0"]))
    tasks = f"piqa: {{{fields}}}"
    if not own:
        others = ("winogrande", "hellaswag", "arc_easy", "arc_challenge", "mmlu")
        tasks = ", ".join([tasks, *(f"{other}: false" for other in others)])
    source = "" if own else "source: 'file://items', "
    text = f"set: {{evaluate: {{{source}tasks: {{{tasks}}}}}}}\nevaluate: [%s]\n"
    assert message in _finding(load, text % "reasoning")
    assert load(text % "lm").cells, "what is not evaluated is not read"


def test_a_folder_and_a_zip_file_of_items_pass(load: Load, tmp_path: Path) -> None:
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "test.jsonl").write_text(json.dumps({"article": "a", "problems": PROBLEMS}) + "\n")
    assert load("set: {evaluate.tasks.race: {source: 'file://race'}}\n").cells


@pytest.mark.parametrize("score", [None, math.nan, "", "much", [1], True])
def test_a_persons_labels_without_a_score_are_refused_by_the_plan(load: Load, tmp_path: Path, score: Any) -> None:
    row = {"prompt": "Ask", "response": "No.", "score": 1}
    (tmp_path / "labels.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'score': score})}\n")
    found = _finding(load, "set: {evaluate.judges: {labels: {source: 'file://labels.jsonl'}}}\n")
    assert "labels.jsonl, row 2" in found
    assert "score" in found


def _examples(count: int, name: str = "r") -> list[Example]:
    return [Example(f"{name}{i}", "s", f"{name}{i}", " x") for i in range(count)]


def test_an_epoch_is_what_is_left_of_the_rows_and_what_is_mixed_in() -> None:
    """Counted by splitting rows as the data stage does."""
    fractions = [0.0, 0.01, 0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.58, 0.9]
    combinations = 0
    for rows, holdout in itertools.product([*range(2, 60), 100, 999, 1030], fractions):
        data = DataSpec("hub://a/b@c", format="instruction", rows=rows, holdout=holdout)
        try:
            train, heldout = split_rows(_examples(rows), data, seed=rows)
        except SourceError:
            continue
        assert len(train) + len(heldout) == rows
        for mixed in (0, 1, 7):
            mix = MixSpec("hub://a/b@c", rows=mixed)
            assert training_examples(DataSpec(data.source, data.format, rows=rows, holdout=holdout, mix=mix)) == (
                len(train) + mixed
            )
        combinations += 1
    assert combinations > 800


@pytest.mark.parametrize("epochs", [1, 2, 3, 0.5, 2.5])
def test_every_example_is_seen_exactly_as_often_as_there_are_epochs(epochs: float) -> None:
    """Whole epochs come first; what fills the last step up begins the next one."""
    for examples, batch, accumulation in itertools.product([1, 2, 5, 16, 17, 33, 100], [1, 2, 3, 8], [1, 2, 3]):
        spec = DataSpec("", format="instruction")
        train = TrainSpec(spec, micro_batch=batch, accumulation=accumulation)
        length = parse_length(f"{epochs} epochs")
        assert not isinstance(length, int)
        if (wanted := epochs * examples) < 1:
            continue
        steps = length.steps(train, examples)
        positions = steps * batch * accumulation
        assert wanted <= positions < wanted + batch * accumulation
        order = _Order(examples, seed=3)
        seen = Counter(row for row, _ in map(order.row, range(positions)))
        whole = Counter(row for row, _ in map(order.row, range(int(epochs) * examples)))
        assert set(whole.values()) <= {int(epochs)}
        assert len(whole) == (examples if epochs >= 1 else 0)
        most = math.ceil(positions / examples)
        assert all(int(epochs) <= count <= most for count in seen.values())


@pytest.mark.parametrize("rows", [0, 10, 40, 60])
def test_epochs_of_a_file_count_its_different_rows(load: Load, tmp_path: Path, rows: int) -> None:
    (tmp_path / "d.jsonl").write_text(_rows(40) + _rows(10))
    (tmp_path / "m.jsonl").write_text(_rows(30))
    mix = "{source: 'file://m.jsonl', prompt_field: prompt, response_field: response, rows: 6}"
    data = f"{{source: 'file://d.jsonl', rows: {rows}, holdout: 0.1, mix: {mix}}}"
    grid = load(f"set: {{finetune: {{micro_batch: 1, accumulation: 1, steps: 2 epochs, data: {data}}}}}\n")
    spec = grid.cells[0].cell.finetune
    assert spec is not None
    train, _ = split_rows(read_rows(spec.data), spec.data, seed=0)
    assert spec.steps == 2 * (len(train) + len(mixed_rows(spec.data.mix, 0)))
    assert spec.data.examples == len(train) + 6


def test_epochs_count_the_examples_that_are_mixed_in(load: Load, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(_rows(30))
    mix = "set: {finetune.data.mix: {source: 'file://m.jsonl', prompt_field: prompt, response_field: response}}\n"
    grid = load(
        f"{mix}factors: {{mix_rows: [0, 10, 30]}}\n",
        overrides=["set.finetune.steps=1 epoch", "set.finetune.data.rows=100", "set.finetune.micro_batch=1"],
    )
    steps = {item.factors["mix_rows"]: item.cell.finetune.steps for item in grid.cells if item.cell.finetune}
    assert steps == {0: 49, 10: 54, 30: 64}


def test_epochs_of_text_are_refused_with_what_to_write(load: Load) -> None:
    found = _finding(load, "set: {pretrain: {steps: 2 epochs, data: {rows: 100}}}\n")
    assert found == "'2 epochs' counts windows of text, and how many there are is known when it is tokenized"


def test_the_node_refuses_data_of_another_number_of_examples_than_epochs_were_counted_for() -> None:
    data = DataSpec("hub://a/b@c", format="instruction", examples=98)
    check_epoch(data, 98)
    check_epoch(DataSpec("hub://a/b@c"), 7)
    with pytest.raises(SourceError, match="an epoch has 97 examples, not the 98"):
        check_epoch(data, 97)


def test_what_epochs_were_counted_for_reaches_the_node_and_no_key() -> None:
    data = DataSpec("hub://a/b@c", format="instruction", examples=98)
    train = TrainSpec(data)
    assert constant_part(train, "").data.examples == 98
    plain: Any = TrainSpec(DataSpec("hub://a/b@c", format="instruction"))
    assert digest(train) == digest(plain)


def test_a_files_head_is_read_once_for_all_cells(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data import local_data, rows

    (tmp_path / "d.jsonl").write_text(_rows(9))
    opened: list[Path] = []
    genuine = rows.read_file

    def read(path: Path, *rest: Any) -> Any:
        opened.append(path)
        return genuine(path, *rest)

    monkeypatch.setattr(local_data, "read_file", read)
    grid = load("factors: {lr: [1e-4, 2e-4], seed: [0, 1]}\nset: {finetune.data.source: 'file://d.jsonl'}\n")
    assert len(grid.cells) == 4
    assert opened == [tmp_path / "d.jsonl"]


def test_pinned_data_are_where_they_were(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(_rows(3))
    assert pin(DataSpec("file://d.jsonl", format="instruction"), tmp_path).source == f"file://{tmp_path}/d.jsonl"
