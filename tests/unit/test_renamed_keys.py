"""A key that was renamed is understood for one release, wherever a grid writes it, and told with its place."""

from __future__ import annotations

import pytest

from orchestrator.errors import GridError
from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import parse_yaml
from orchestrator.grid import renamed
from orchestrator.grid.load import Grid
from tests.unit.conftest import Load

TEXT = """factors:
  {rate}: [1.0e-4, 2.0e-4]
  "[{batch}, freeze]": [[2, none], [4, router]]
set:
  finetune: {{{decay}: 0.2}}
  finetune.{decay}: 0.3
  pretrain.lr: 1.0e-3
also:
  - {{seed: [0], finetune.{rate}: [3.0e-4]}}
exclude:
  - {{{rate}: 2.0e-4, {batch}: 4}}
with:
  {rate}:
    0.0001: {{{clip}: 0.5}}
scales:
  tiny:
    set: {{finetune.{clip}: 0.7}}
"""
NOW = {"rate": "lr", "batch": "micro_batch", "decay": "weight_decay", "clip": "clip"}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The names before, of fields of fine-tuning."""
    before = {"rate": "rate", "batch": "rows_a_step", "decay": "decay_of_weights", "clip": "clip_to"}
    table = {("finetune", old): NOW[name] for name, old in before.items()}
    monkeypatch.setattr(renamed, "RENAMED", table)
    return before


def science(grid: Grid) -> list[str]:
    return [item.id for item in grid.cells]


def test_an_old_name_means_the_new_one_everywhere_and_is_told(
    load: Load, rows: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    new = load(TEXT.format(**NOW))
    assert not caplog.records
    old = load(TEXT.format(**rows), overrides=["set.finetune.rate=5.0e-4"])
    assert science(old) == science(load(TEXT.format(**NOW), overrides=["set.finetune.lr=5.0e-4"])) != []
    assert [item.factors for item in old.cells] == [item.factors for item in new.cells]
    said = caplog.text
    assert "rate is called lr now" in said
    assert "grid.yaml:3" in said
    assert "finetune.decay_of_weights is called finetune.weight_decay now" in said
    assert "[rows_a_step, freeze] is called [micro_batch, freeze] now" in said


def test_what_is_wrong_with_it_is_told_at_its_line_and_without_a_row_it_is_unknown(
    load: Load, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GridError, match=r"finetune.lr must be .*grid.yaml:4"):
        load("factors: {seed: [0]}\nset:\n  finetune.rate: fast\n")
    monkeypatch.setattr(renamed, "RENAMED", {})
    with pytest.raises(GridError, match=r"'finetune.rate' is not a field"):
        load("factors: {seed: [0]}\nset:\n  finetune.rate: 1.0\n")


OLD_VALUES = """baseline: {{backbone: {llama}}}
exclude:
  - {{backbone: {llama}, freeze: none}}
set:
  model: {{backbone: {llama}}}
scales:
  tiny:
    set: {{model.backbone: {llama}}}
factors:
  freeze: [none, expert]
"""
A_LIST = """  backbone: [olmoe, {llama}]
with:
  backbone:
    {llama}: {{finetune.clip: 0.5}}
"""
PAIRS = '  "[backbone, seed]": [[{llama}, 0], [olmoe, 1]]\n'


@pytest.mark.parametrize("axis", [A_LIST, PAIRS])
def test_an_old_value_means_the_new_one_everywhere_and_is_told(
    load: Load, axis: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = OLD_VALUES + axis
    new = load(text.format(llama="llama"))
    assert not caplog.records
    old = load(text.format(llama="smollm2"))
    assert science(old) == science(new) != []
    assert [item.factors for item in old.cells] == [item.factors for item in new.cells]
    lines = [number for number, row in enumerate(text.splitlines(), 2) if "{llama}" in row]
    assert all(f"grid.yaml:{line})" in caplog.text for line in lines)
    assert "smollm2 is called llama now" in caplog.text


def test_an_old_value_on_the_command_line_is_told_too(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    (item,) = load("set: {finetune.clip: 0.5}", overrides=["set.model.backbone=smollm2"]).cells
    assert item.cell.model.backbone == "llama"
    assert "smollm2 is called llama now (command line)" in caplog.text


def test_an_old_value_inside_a_setting_of_the_command_line_and_after_only(load: Load) -> None:
    (item,) = load("factors: {seed: [0]}", overrides=["set.model={backbone: smollm2, num_layers: 2}"]).cells
    assert (item.cell.model.backbone, item.cell.model.num_layers) == ("llama", 2)
    (item,) = load("factors: {backbone: [olmoe, llama]}", only=["backbone=smollm2"]).cells
    assert item.cell.model.backbone == "llama"
    said = "with.backbone={smollm2: {model.norm_eps: 1e-6}, olmoe: {model.norm_eps: 1e-4}}"
    items = load("factors: {backbone: [olmoe, llama]}", overrides=[said]).cells
    assert [item.cell.model.norm_eps for item in items] == [1e-4, 1e-6]


def test_an_old_value_in_a_search_is_the_new_one() -> None:
    said = "search: {space: {backbone: {choice: [olmoe, smollm2]}, freeze: {choice: [none, smollm2]}}}"
    document = parse_yaml(said, "grid.yaml", Problems())
    renamed.renew(document)
    found = document.data["search"]["space"]
    assert found == {"backbone": {"choice": ["olmoe", "llama"]}, "freeze": {"choice": ["none", "smollm2"]}}


def test_an_old_value_in_a_recipe_is_the_new_one() -> None:
    recipe = parse_yaml("model:\n  backbone: smollm2\n  moe: {preset: smoe}\n", "recipe.yaml", Problems())
    renamed.renew(recipe)
    assert recipe.data == {"model": {"backbone": "llama", "moe": {"preset": "smoe"}}}
