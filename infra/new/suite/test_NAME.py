"""The suite NAME: `python -m pytest test_NAME.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moegrid.extend
import pytest
import torch
from moegrid.extend import code_of, load_plugin

KIND = load_plugin(Path(__file__).with_name("NAME.py"))["suite NAME"]


@pytest.mark.parametrize(("power", "size"), [(1.0, 3.0), (2.0, 9.0)])
def test_it_commits_its_columns(monkeypatch: pytest.MonkeyPatch, power: float, size: float) -> None:
    model = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.constant_(model.weight, -3.0)
    monkeypatch.setattr(moegrid.extend, "load_state", lambda context, work: SimpleNamespace(model=model), raising=False)
    committed: dict[str, Any] = {}
    context = SimpleNamespace(commit=lambda work, **what: committed.update(what))
    code_of(KIND)(context, "work", KIND.parameters(power=power))
    assert set(committed["metrics"]) == set(KIND.columns)
    assert committed["metrics"]["NAME_size"] == pytest.approx(size)
