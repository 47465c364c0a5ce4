"""Grids, recipes, scales and sites are found in the working directory, then in MOEGRID_PATH, then in the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator import resources
from orchestrator.errors import MoegridError
from orchestrator.grid.files import find_grid
from orchestrator.settings import load_site, tracking_uri


def put(folder: Path, path: str, text: str = "name: mine\n") -> Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def test_the_nearest_of_a_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, shared, late = (tmp_path / name for name in ("here", "shared", "late"))
    put(here, "grids/both.yaml")
    put(shared, "grids/both.yaml")
    put(shared, "grids/quickstart.yaml")
    put(late, "grids/quickstart.yaml")
    monkeypatch.chdir(here)
    monkeypatch.setenv("MOEGRID_PATH", os.pathsep.join(map(str, (shared, late))))
    assert find_grid("both") == here / "grids" / "both.yaml"
    assert find_grid("quickstart") == shared / "grids" / "quickstart.yaml"
    assert find_grid("finetune_freeze") == resources.ROOT / "grids" / "finetune_freeze.yaml"
    assert {"both", "quickstart", "finetune_freeze"} <= resources.files("grid").keys()
    assert resources.files("grid")["both"] == here / "grids" / "both.yaml"


def test_a_site_of_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "sites/mine.yaml", "backend: local\ncores: 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_site("mine").path == str(tmp_path / "sites" / "mine.yaml")
    with pytest.raises(MoegridError, match="unknown site 'mien'") as caught:
        load_site("mien")
    assert "mine" in str(caught.value)


def test_without_mlflow_nothing_is_tracked_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MOEGRID_TRACKING", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("orchestrator.settings.installed", lambda module: module != "mlflow")
    assert tracking_uri(None, str(tmp_path)) == ""
    with pytest.raises(MoegridError, match="mlflow is not installed") as caught:
        tracking_uri("http://127.0.0.1:5000", str(tmp_path))
    assert "moegrid[mlflow]" in str(caught.value)
