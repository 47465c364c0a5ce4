"""What could be overlooked in a grid: cells that look alike, and settings that another word wins over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.errors import GridError
from orchestrator.grid.load import Grid

Load = Callable[..., Grid]


@pytest.mark.parametrize("order", ["[[0, one], [1, two]]", "[[1, two], [0, one]]"])
def test_cells_that_differ_in_seed_and_resources_alone_are_all_looked_at(load: Load, order: str) -> None:
    text = f"factors: {{'[seed, width]': {order}}}\n"
    text += "with: {width: {one: {}, two: {execution.resources.finetune.processes: 2}}}\n"
    text += "set: {execution.engine: fsdp, execution.resources.pretrain.processes: 2}\n"
    with pytest.raises(GridError, match="engine 'fsdp' needs 2 processes or more in finetune"):
        load(text)


@pytest.mark.parametrize("word", ["set.evaluate.suites=[lm]", "set.evaluate.at=[0.5]", "set.evaluate={at: [0.5]}"])
def test_a_setting_that_a_section_of_the_grid_says_is_no_setting(load: Load, word: str) -> None:
    key = "evaluate" if "suites" in word else "at"
    with pytest.raises(
        GridError, match=rf"{key} says it \(.*grid.yaml:3\) \(command line: .*\n  hint: write it as {key}:"
    ):
        load("factors: {seed: [0]}\n" + ("evaluate: [lm]\n" if key == "evaluate" else "at: [1.0]\n"), overrides=[word])
    (item,) = load("factors: {seed: [0]}\n", overrides=["set.evaluate.at=[0.5, 1.0]"]).cells
    assert item.cell.evaluate.at == (0.5, 1.0)


@pytest.mark.parametrize(
    ("scales", "overrides"),
    [("", ["at=[1.0]"]), ("", ["set.evaluate.at=[0.25]", "at=[1.0]"]), ("scales: {tiny: {at: [1.0]}}\n", [])],
)
def test_a_section_that_is_said_later_wins_over_a_setting(load: Load, scales: str, overrides: list[str]) -> None:
    text = "factors: {seed: [0]}\nset: {evaluate.at: [0.5]}\n" + scales
    (item,) = load(text, overrides=overrides).cells
    assert item.cell.evaluate.at == (1.0,)
