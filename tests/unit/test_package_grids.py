"""Grids, recipes, scales and sites of an installed package are found by name, after ours."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import resources
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.files import find_grid
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.settings import load_site
from tests.packages import found, install

MODULE = """
from orchestrator.resources import GridFolder

OURS = GridFolder("shelf", "shelves", "shelf_data")
LOST = GridFolder("lost", "no_such_package")
"""
FILES = {
    "grids/shelved.yaml": "name: shelved\nbase: small_recipe\nfactors: {seed: [0, 1]}\nevaluate: [lm]\n",
    "grids/quickstart.yaml": "name: quickstart\nbase: finetune\n",
    "grids/scales/nano.yaml": "description: seconds\nset: {pretrain.steps: 3}\n",
    "sites/attic.yaml": "backend: local\ncores: 1\n",
}


def lay(folder: Path, name: str, data: str) -> None:
    install(folder, name, MODULE.replace("shelf_data", data), {"grids": {f"{name}_grids": f"{name}:OURS"}})
    module = (folder / f"{name}.py").read_text().replace('"shelf"', f'"{name}_grids"').replace('"shelves"', f'"{name}"')
    (folder / f"{name}.py").write_text(module)
    recipe = (resources.ROOT / "grids" / "recipes" / "pretrain.yaml").read_text()
    for path, text in {**FILES, "grids/recipes/small_recipe.yaml": recipe}.items():
        target = folder / data / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    with found(tmp_path / "site", "shelves", "other") as folder:
        yield folder


def test_what_a_package_brings_has_a_name(site: Path) -> None:
    lay(site, "shelves", "data")
    grid = load_grid("shelved", scale="nano")
    assert [item.name for item in grid.cells] == ["seed=0", "seed=1"]
    train = grid.cells[0].cell.pretrain
    assert train is not None
    assert train.steps == 3
    assert load_site("attic").path == str(site / "data" / "sites" / "attic.yaml")
    assert {"shelved", "quickstart", "finetune_freeze"} <= resources.files("grid").keys()
    assert find_grid("quickstart") == resources.ROOT / "grids" / "quickstart.yaml", "ours come first"
    with pytest.raises(GridError, match="did you mean 'shelved'"):
        find_grid("shelvd")


def test_two_packages_with_one_name_are_told(site: Path) -> None:
    lay(site, "shelves", "data")
    lay(site, "other", "more")
    with pytest.raises(MoegridError, match=r"grid 'shelved' comes from two packages: .*other 1.2.*"):
        find_grid("shelved")
    assert find_grid("quickstart") == resources.ROOT / "grids" / "quickstart.yaml"


def test_a_broken_package_hides_no_other(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay(site, "shelves", "data")
    install(site, "other", MODULE, {"grids": {"lost": "other:LOST", "gone": "other:NOBODY"}})
    assert find_grid("shelved").is_file()
    assert "no_such_package" in caplog.text
    assert "cannot be loaded from other 1.2" in caplog.text


def test_the_plan_of_a_project_grid_looks_at_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    for name in ("quickstart", "finetune_freeze", "pretrain_router"):
        assert build_graph(load_grid(name)).stages
