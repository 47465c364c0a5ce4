"""What of a grid file is part of a cell's identity, and what is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from orchestrator.grid.load import Grid, load_grid
from tests.benchmark_samples import PROBLEMS
from tests.tokenizer_families import LLAMA

Load = Callable[..., Grid]


def test_execution_is_no_part_of_a_cells_id(load: Load) -> None:
    text = "factors: {freeze: [none, router]}\n"
    other = "set.execution.resources.finetune.cores=4"
    assert [i.id for i in load(text).cells] == [i.id for i in load(text, overrides=[other]).cells]


def test_what_is_measured_when_is_no_part_of_a_cells_id(load: Load) -> None:
    text = "factors: {freeze: [none, router]}\n"
    changed = load(text, overrides=["at=[0.25,0.5,1.0]", "evaluate=[lm]"])
    assert [i.id for i in load(text).cells] == [i.id for i in changed.cells]


def test_every_science_field_is_part_of_a_cells_id(load: Load) -> None:
    base = load("").cells[0]
    changes = [
        "finetune.lr=1e-5",
        "finetune.micro_batch=4",
        "finetune.balance.z_coef=0.1",
        "finetune.freeze=router",
        "pretrain.steps=999",
        "model.norm_eps=1e-6",
        "model.moe.router_init_std=0.04",
        "tokenizer.vocab_size=4000",
        "evaluate.max_length=500",
        "seed.data=1",
        "seed.eval=1",
    ]
    ids = {load("", overrides=[f"set.{change}"]).cells[0].id for change in changes}
    assert len(ids) == len(changes)
    assert base.id not in ids


def test_equal_sections_are_one_object(load: Load) -> None:
    """What is shared by ten thousand cells is built and hashed once."""
    grid = load("factors: {freeze: [none, router], seed: [0, 1, 2]}\n")
    assert len({id(item.cell.model) for item in grid.cells}) == 1
    assert len({id(item.cell.finetune) for item in grid.cells}) == 2


def test_a_file_source_is_pinned_by_its_content(load: Load, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    text = "set: {finetune.data.source: 'file://mine.jsonl'}\n"
    first = load(text).cells[0]
    assert first.cell.finetune is not None
    assert first.cell.finetune.data.source == f"file://{data}"
    assert first.cell.finetune.data.digest == hashlib.sha256(data.read_bytes()).hexdigest()
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(data.read_bytes())
    assert load(text.replace("mine", "elsewhere")).cells[0].id == first.id
    data.write_text('{"prompt": "a", "response": "c"}\n{"prompt": "c", "response": "d"}\n')
    assert load(text).cells[0].id != first.id


def test_a_folder_of_items_is_pinned_by_its_files(load: Load, tmp_path: Path) -> None:
    (tmp_path / "items" / "race").mkdir(parents=True)
    rows = tmp_path / "items" / "race" / "test.jsonl"
    row = json.dumps({"article": "Ann came.", "problems": PROBLEMS})
    rows.write_text(f"{row}\n")
    others = "winogrande: false, hellaswag: false, arc_easy: false, arc_challenge: false, piqa: false, mmlu: false"
    text = f"set: {{evaluate: {{source: 'file://items', tasks: {{race: {{}}, {others}}}}}}}\n"
    first = load(text).cells[0]
    assert first.cell.evaluate.source == f"file://{tmp_path}/items"
    rows.write_text(f"{row} \n")
    assert load(text).cells[0].cell.evaluate.digest != first.cell.evaluate.digest


def test_loading_twice_gives_the_same_grid() -> None:
    assert load_grid("finetune_freeze") == load_grid("finetune_freeze")


def test_every_change_of_a_grid_is_a_new_version(load: Load) -> None:
    text = "factors: {freeze: [none, router]}\n"
    overrides = [
        "at=[1.0]",
        "evaluate=[lm]",
        "set.execution.log_every=3",
        "set.finetune.lr=1e-4",
        "baseline.freeze=none",
    ]
    digests = {load(text, overrides=[override]).digest for override in overrides}
    assert len(digests | {load(text).digest, load(text, only=["freeze=none"]).digest}) == len(overrides) + 2
    assert load(text).digest == load(text).digest


def test_a_checkpoint_of_this_machine_is_pinned_by_its_content(load: Load, tmp_path: Path) -> None:
    from orchestrator.spec.work import InitWork

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    text = "set: {model.checkpoint: 'file://mine'}\n"
    first = load(text).cells[0]
    assert first.cell.model.checkpoint == f"file://{folder}"
    moved = folder.rename(tmp_path / "yours")
    second = load(text.replace("mine", "yours")).cells[0]
    assert (second.id, second.cell.model.checkpoint) == (first.id, f"file://{moved}")
    keys = [InitWork(item.cell.model, "t").key() for item in (first, second)]
    assert keys[0] == keys[1]
    (moved / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": "float32"}))
    third = load(text.replace("mine", "yours")).cells[0]
    assert third.id != first.id
    assert InitWork(third.cell.model, "t").key() != keys[0]
