"""The notebook of the examples runs from top to bottom on a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import Store
from tests.grid_store import GridStore

NOTEBOOK = Path(__file__).parents[2] / "examples" / "results.ipynb"


def test_every_cell_runs_and_the_means_are_those_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("agg")
    GridStore(Store.open(str(tmp_path / "runs")), settings=("none", "router"), seeds=(0, 1)).commit_all()
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "runs"))
    notebook = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "outputs are not committed"
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    summary, rows = names["summary"], names["store"].results("demo")
    assert sorted(summary.index) == ["none", "router"]
    for setting in ("none", "router"):
        values = [row["answer_bpb"] for row in rows if row["freeze"] == setting]
        assert summary.loc[setting, "mean"] == pytest.approx(sum(values) / len(values))
    assert list(names["curves"].index)[-1] == 1.0
