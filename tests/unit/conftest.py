"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import GridError, Problem
from orchestrator.grid.load import Grid, load_grid

Load = Callable[..., Grid]
Told = Callable[[str], Problem]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, **arguments: Any) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text("base: finetune\n" + text if "base:" not in text else text)
        return load_grid(str(path), **arguments)

    return load


@pytest.fixture
def told(load: Load) -> Told:
    """Return the one problem that reading a grid's text tells."""

    def told(text: str) -> Problem:
        with pytest.raises(GridError) as raised:
            load(text)
        (problem,) = raised.value.problems
        return problem

    return told
