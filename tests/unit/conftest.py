"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.grid.load import Grid, load_grid

Load = Callable[..., Grid]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, **arguments: Any) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text("base: finetune\n" + text if "base:" not in text else text)
        return load_grid(str(path), **arguments)

    return load
