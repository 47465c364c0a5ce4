"""A value is the same one wherever a grid writes it: in a list, on the command line, or as a key of `with`."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import GridError
from orchestrator.grid.expand import GridCell
from orchestrator.grid.load import load_grid


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    return tmp_path / "grid.yaml"


def cells(grid: Path, text: str, *only: str) -> tuple[GridCell, ...]:
    grid.write_text(f"base: finetune\n{text}")
    return tuple(load_grid(str(grid), only=only).cells)


@pytest.mark.parametrize("factor", ["lr", "pace"])
def test_a_number_is_the_same_value_as_a_key(grid: Path, factor: str) -> None:
    said = "{1e-4: {weight_decay: 0.1}, 2e-4: {z_coef: 0.1}}"
    text = f"factors: {{{factor}: [1e-4, 2e-4]}}\nwith: {{{factor}: {said}}}"
    one, other = cells(grid, text)
    assert (one.factors[factor], other.factors[factor]) == (1e-4, 2e-4)
    decays = [item.cell.phases["finetune"].weight_decay for item in (one, other)]
    assert decays[0] == 0.1 != decays[1]
    assert [item.id for item in cells(grid, text, f"{factor}=1e-4")] == [one.id]


def test_named_settings_that_say_the_same_are_told_as_equal_cells(grid: Path) -> None:
    text = "factors: {size: [one, other]}\nwith: {size: {one: {}, other: {}}}"
    with pytest.raises(GridError, match="cells 'size=one' and 'size=other' differ in a factor but are the same"):
        cells(grid, text)
    with pytest.raises(GridError) as caught:
        cells(grid, text.replace("other: {}", "other: {lr: fast}"))
    assert [one.key for one in caught.value.problems] == ["lr"]
    with pytest.raises(GridError, match="has the value one twice"):
        cells(grid, text.replace("[one, other]", "[one, one]"))
