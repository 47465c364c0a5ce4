"""A stranger's router trains, is evaluated and tabled: an installed package, one parameter, and nothing edited."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.outside_router import noisy_installed
from tests.small_grid import GRID, made_up_text, moegrid

NOISE = "model.moe.parameters.noise"


def test_a_grid_varies_its_parameter_and_tables_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
    folder = made_up_text(tmp_path)
    grid, store = folder / "small.yaml", tmp_path / "store"
    text = GRID.format(at="[1.0]", folder=folder)
    factors = f"factors: {{preset: [smoe, noisy], {NOISE}: [0, 8]}}\nwhen: {{{NOISE}: {{preset: noisy}}}}"
    text = text.replace("factors: {freeze: [none, none->router]}", factors)
    grid.write_text(text.replace("baseline: {freeze: none}", "baseline: {preset: smoe}"))
    with noisy_installed(site):
        plan = json.loads(moegrid("plan", str(grid), "--store", str(store), "--json"))
        assert [use["shown"] for use in plan["plugins"]] == ["outside_router 1.2 (routers: noisy)"]
        assert {row["preset"] for row in plan["models"]} == {"smoe", "noisy"}
        moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
        cells = json.loads(moegrid("status", str(grid), "--store", str(store), "--json"))["cells"]
        assert {cell["state"] for cell in cells} == {"done"}
        losses = {cell["name"]: cell["metrics"]["val_loss"] for cell in cells}
        assert len(set(losses.values())) == 3, "each noise is another model"
        table = moegrid("table", str(grid), "--store", str(store), "--format", "csv")
        assert all(f"noisy,{noise},0,done,,outside_router 1.2," in table for noise in (0, 8)), table
