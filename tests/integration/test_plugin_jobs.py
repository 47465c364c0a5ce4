"""A grid with a plugin file, run as a user runs it: its content is in the keys, its text on the nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.store import Store
from tests.lab_slurm import SlurmLab
from tests.small_grid import GRID, made_up_text, moegrid

PLUGIN = """
import torch
from orchestrator.catalog.losses import LossKind

TILT = LossKind("tilt", code="./tilt.py:tilt")

def tilt(routing):
    return routing.scores[..., 0].mean()
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Two cells, the second of which fine-tunes with the loss of a plugin file."""
    made_up_text(tmp_path)
    text = GRID.format(at="[1.0]", folder=tmp_path)
    text = text.replace("{freeze: [none, none->router]}", "{losses.tilt: [0, 0.5]}")
    text = text.replace("baseline: {freeze: none}", "plugins: [mine/tilt.py]")
    assert "losses.tilt" in text
    assert "plugins" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tilt.py").write_text(PLUGIN)
    (tmp_path / "small.yaml").write_text(text)
    return tmp_path / "small.yaml"


def words(grid: Path, *more: str) -> tuple[str, ...]:
    return (str(grid), "--store", str(grid.parent / "store"), "--tracking", "none", *more)


def providers(grid: Path) -> dict[str, list[list[str]]]:
    """Return kind of artifact -> the providers that each of them names, without states in between."""
    opened = Store.peek(str(grid.parent / "store"))
    told: dict[str, list[list[str]]] = {}
    for manifest in opened.artifacts.many(opened.artifacts.keys()).values():
        if manifest.info.get("phase") != "finetune" or manifest.info["step"] == 8:
            named = [use["provider"] for use in manifest.provenance.get("plugins", [])]
            told.setdefault(manifest.kind, []).append(named)
    return {kind: sorted(named) for kind, named in told.items()}


def actions(grid: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(moegrid("plan", *words(grid), "--json"))["actions"]
    return found


def test_a_loss_of_a_plugin_file_trains_on_nodes_that_have_only_its_submission(grid: Path) -> None:
    (use,) = json.loads(moegrid("plan", *words(grid), "--json"))["plugins"]
    assert use["shown"].startswith("tilt.py ")
    assert use["names"] == {"losses": ["tilt"]}
    moegrid("run", *words(grid, "--processes", "2"))
    told = providers(grid)
    assert told["train"].count(["tilt.py"]) == 1, "the cell without the loss, and what both share, use nothing of it"
    assert told["train"].count([]) >= 2
    assert {tuple(named) for kind in told.keys() - {"train"} for [*named] in told[kind]} == {()}
    rows = json.loads(moegrid("table", *words(grid, "--format", "json")))
    assert [row["plugins"].split(" ")[0] for row in rows] == ["", "tilt.py"]
    before = actions(grid)
    assert before["run"] == 0

    (grid.parent / "mine" / "tilt.py").write_text(PLUGIN + "# another version\n")
    after = actions(grid)
    assert after["run"] == 2, "the training and the evaluation of one cell"
    assert after["done"] == before["done"] - 2

    cells = json.loads(moegrid("explain", *words(grid), "--json"))["cells"]
    assert [[change["field"] for change in cell["changes"]] for cell in cells] == [[], ["plugins.tilt.py"]]
    assert cells[1]["why"] == "new: 1 field changed since the version before"

    (grid.parent / "mine" / "tilt.py").unlink()
    moegrid("plan", *words(grid), code=2)


@pytest.mark.faults
def test_a_plugin_file_reaches_the_workers_of_a_ray_cluster(ray_lab: object, grid: Path) -> None:
    grid.write_text(grid.read_text().replace("[0, 0.5]", "[0.5]"))
    moegrid("run", *words(grid, "--site", "ray", "--no-report"))
    assert providers(grid)["train"].count(["tilt.py"]) == 1


def test_a_plugin_file_reaches_the_nodes_of_a_slurm_cluster(
    slurm_lab: SlurmLab, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEGRID_SLURM_LOGS", str(tmp_path / "logs"))
    grid.write_text(grid.read_text().replace("[0, 0.5]", "[0.5]"))
    moegrid("run", *words(grid, "--site", "slurm", "--no-report"))
    assert providers(grid)["train"].count(["tilt.py"]) == 1
