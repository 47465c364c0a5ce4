"""One grid at three sites, its training stages on several nodes: equal numerics end with equal bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.lab_slurm import SlurmLab
from tests.small_grid import GRID, lose_power, made_up_text, moegrid, weights

STEPS = 60
CUT = GRID.replace("[none, none->router]", "[none->router]").replace("baseline: {{freeze: none}}\n", "")
CUT = CUT.replace("{{steps: 8,", f"{{{{steps: {STEPS},")
TWO_RANKS = {"local": ("--processes", "2"), "slurm": ("--nodes", "2"), "ray": ("--nodes", "2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up text and a grid over it."""
    made = made_up_text(tmp_path_factory.mktemp("data"))
    (made / "small.yaml").write_text(CUT.format(at="[1.0]", folder=made))
    return made


def run(grid: Path, store: Path, site: str, *words: str, code: int = 0, resume: bool = False) -> str:
    """Run the grid at a site, with an untimed table on stdout."""
    command = "resume" if resume else "run"
    words = ("--store", str(store), "--tracking", "none", "--site", site, "--no-report", *words)
    return moegrid(command, str(grid), *words, code=code)


def assert_logs_of_both_ranks(grid: Path, store: Path) -> None:
    """Each rank of the last training job has its own log in the store, and there is no third."""
    *_, attempt = sorted(path.parts[-3] for path in store.glob("attempts/*/log/1.txt"))
    logs = [moegrid("logs", f"{grid}:{attempt}", "--store", str(store), "--rank", rank) for rank in ("0", "1")]
    assert all("finetune" in log for log in logs)
    assert logs[0] != logs[1]
    moegrid("logs", f"{grid}:{attempt}", "--store", str(store), "--rank", "2", code=2)


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The grid on this machine, two processes a training stage, undisturbed."""
    store = tmp_path_factory.mktemp("straight") / "store"
    run(folder / "small.yaml", store, "local", *TWO_RANKS["local"])
    assert_logs_of_both_ranks(folder / "small.yaml", store)
    return weights(folder / "small.yaml", store)


def page(grid: Path, store: Path) -> str:
    """Return the report's page."""
    path = store / "index.html"
    moegrid("report", str(grid), "--store", str(store), "--output", str(path))
    return path.read_text()


def test_a_cell_begun_here_ends_on_slurm_with_equal_bits_and_only_with_equal_numerics(
    slurm_lab: SlurmLab, folder: Path, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEGRID_SLURM_LOGS", str(tmp_path / "logs"))
    grid, half, other = folder / "small.yaml", tmp_path / "half", tmp_path / "other"
    lose_power(grid, half, "finetune", STEPS, *TWO_RANKS["local"])
    shutil.copytree(half, other)
    run(grid, half, "slurm", *TWO_RANKS["slurm"], resume=True)
    assert weights(grid, half) == straight
    assert_logs_of_both_ranks(grid, half)
    assert "other numerics" not in page(grid, half)
    run(grid, other, "slurm", code=1, resume=True)
    (cell,) = json.loads(moegrid("status", str(grid), "--store", str(other), "--json"))["cells"]
    assert "world_size 2 -> 1" in cell["reason"]
    run(grid, other, "slurm", "--allow-numerics", resume=True)
    assert "from a state of other numerics" in page(grid, other)


@pytest.mark.faults
def test_the_same_grid_on_ray(
    ray_lab: object, folder: Path, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run(folder / "small.yaml", store, "ray", *TWO_RANKS["ray"])
    assert weights(folder / "small.yaml", store) == straight
    assert_logs_of_both_ranks(folder / "small.yaml", store)
