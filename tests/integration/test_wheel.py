"""The built distribution in an empty folder of a fresh environment: plan, run, report, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.small_grid import GRID, made_up_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project built as a wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked into a fresh environment, with the libraries of this one and a foreign package `jobs`."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "jobs").mkdir()
    (site / "jobs" / "__init__.py").write_text("WHOSE = 'foreign'\n")
    return folder


def run(environment: Path, *words: str, cwd: Path, code: int = 0, **variables: str) -> str:
    """Run a command of the environment as a user would, and return what it printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MOEGRID") and k != "PYTHONPATH"}
    command = [str(environment / "bin" / "python"), *words]
    done = subprocess.run(command, cwd=cwd, env=clean | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_nothing_but_moegrid_stands_at_the_top_of_site_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} <= {
        "moegrid",
        next(n for n in names if ".dist-info/" in n).split("/")[0],
    }
    assert not [name for name in names if "__pycache__" in name]
    for needed in ("grids/quickstart.yaml", "grids/recipes/finetune.yaml", "infra/sites/slurm.yaml", "constraints.txt"):
        assert f"moegrid/_parts/{needed}" in names
    packed = {name.removeprefix("moegrid/_parts/") for name in names}
    tracked = subprocess.run(
        ["git", "ls-files", "orchestrator", "jobs", "grids", "infra/sites"], cwd=ROOT, capture_output=True
    )
    assert set(tracked.stdout.decode().split()) <= packed


def test_an_editable_installation_holds_no_copy_of_the_code(tmp_path: Path) -> None:
    """A copy would be what the command runs, whatever the clone has become since."""
    code = "import sys; from hatchling.build import build_editable as build; build(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (made,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert names == ["_moegrid.pth"]
        assert archive.read("_moegrid.pth").decode().split() == [str(ROOT), str(ROOT / "infra" / "package")]


def test_an_empty_folder_becomes_a_project_that_plans(environment: Path, tmp_path: Path) -> None:
    said = run(environment, "-m", "moegrid", "init", cwd=tmp_path)
    assert "moegrid plan my_grid" in said
    assert (tmp_path / "Makefile").is_file()
    assert "8 cells" in run(environment, "-m", "moegrid", "plan", "my_grid", cwd=tmp_path)
    assert "3 cells" in run(environment, "-m", "moegrid", "plan", "quickstart", cwd=tmp_path)
    before = (tmp_path / "grids" / "my_grid.yaml").read_bytes()
    assert "exists already" in run(environment, "-m", "moegrid", "init", cwd=tmp_path, code=2)
    assert (tmp_path / "grids" / "my_grid.yaml").read_bytes() == before


def test_a_plugin_begins_passes_its_test_and_is_planned_with(environment: Path, tmp_path: Path) -> None:
    assert "test_mine.py" in run(environment, "-m", "moegrid", "new", "router", "mine", cwd=tmp_path)
    assert "passed" in run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", cwd=tmp_path)
    (tmp_path / "g.yaml").write_text("base: pretrain\nplugins: [mine]\nset: {model.moe.preset: mine}\nevaluate: [lm]\n")
    assert "(routers: mine)" in run(environment, "-m", "moegrid", "plan", "g.yaml", cwd=tmp_path)


def test_a_grid_runs_beside_a_foreign_package_named_jobs(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()  # one more, where the user stands
    (tmp_path / "jobs" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    folder = made_up_text(tmp_path)
    (tmp_path / "small.yaml").write_text(GRID.format(at="[1.0]", folder=folder))
    grid = ("small.yaml", "--store", "runs", "--tracking", "none")
    site = next(environment.glob("lib/python3*/site-packages"))
    assert "2 cells done" in run(environment, "-m", "moegrid", "run", *grid, cwd=tmp_path)
    assert (tmp_path / "runs" / "reports" / "small" / "index.html").stat().st_size > 10_000
    damaged = max((tmp_path / "runs" / "blobs").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    damaged.write_bytes(b"{}")
    assert "2 cells done" in run(environment, "-m", "moegrid", "resume", *grid, "--verify", cwd=tmp_path)
    (tmp_path / "jobs" / "__init__.py").write_text("WHOSE = 'the user'\n")
    code = (
        "import moegrid, json, jobs;"
        "rows = moegrid.open_store('runs').results('small');"
        "print(json.dumps([jobs.WHOSE, [row['state'] for row in rows], min(row['val_loss'] for row in rows)]))"
    )
    whose, states, loss = json.loads(run(environment, "-c", code, cwd=tmp_path).splitlines()[-1])
    assert (whose, states) == ("the user", ["done", "done"])
    assert 0 < loss < 20
    assert (site / "jobs" / "__init__.py").read_text() == "WHOSE = 'foreign'\n"
