"""A search over router learning rates with fake stages: real Tune, real drivers, one store."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.grid.search import Scheduler, SearchAxis, SearchSpec
from orchestrator.store import Store
from tests.faults.harness import HERE, SITE
from tests.lab_slurm import eventually
from tests.labs import lab_missing

GRID = """
name: lr_search
description: which router learning rate is best
base: finetune
factors:
  freeze: [none]
evaluate: [lm]
search:
  space:
    router_lr: {loguniform: [1e-6, 1e-3]}
  metric: val_loss
  trials: 2
  concurrency: 2
  scheduler: {name: asha, grace: 0.25, reduction: 2}
scales:
  tiny:
    set:
      pretrain.steps: 20
      finetune.steps: 40
"""


def test_the_fractions_at_which_trials_are_judged() -> None:
    axis = SearchAxis("lr", "uniform", (), 0.0, 1.0)
    assert SearchSpec((axis,), "m").fractions == (1.0,)
    assert SearchSpec((axis,), "m", scheduler=Scheduler("asha", 0.1, 3)).fractions == pytest.approx(
        (0.1, 0.3, 0.9, 1.0)
    )


@dataclass
class Search:
    """A search over one store with fake stages."""

    folder: Path
    text: str = GRID

    @property
    def store(self) -> Store:
        return Store.open(str(self.folder / "store"))

    def start(self) -> subprocess.Popen[str]:
        """Start the command in a session of its own."""
        grid = self.folder / "lr_search.yaml"
        grid.write_text(self.text)
        # By a path relative to where the command is given: the workers of Tune have other working directories.
        words = ["run", grid.name, "--store", self.store.url, "--site", str(SITE), "--tracking", "none"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"MOEGRID_RUN_DIR": str(self.folder / "run"), "FAKE_LOG": str(self.folder / "log")}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        program = (sys.executable, str(HERE / "driver.py"))
        code = "import sys; from orchestrator import cli; from orchestrator.commands import search; "
        code += f"search.PROGRAM = {program}; sys.exit(cli.main({words!r}))"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> list[dict[str, Any]]:
        """Run the search to its end and return its trials."""
        process = self.start()
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
        found = self.store.get_json("searches/lr_search.json")
        assert found is not None
        return list(found["trials"])

    def begun(self) -> list[float]:
        """Return the learning rates of the trials that were begun so far."""
        paths = [entry.path for entry in self.store.objects.list("searches/lr_search")]
        return sorted(self.store.get_json(path)["values"]["router_lr"] for path in paths)

    def executions(self) -> list[str]:
        """Return the stages that were executed, each as often as it was."""
        log = self.folder / "log"
        return [json.loads(line)["stage"] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(autouse=True)
def ray_is_there() -> None:
    if importlib.util.find_spec("ray") is None:
        lab_missing("Ray", "the package ray is not installed")


def test_trials_are_ordinary_cells_and_a_killed_search_goes_on_with_them(tmp_path: Path) -> None:
    search = Search(tmp_path)
    process = search.start()
    eventually(lambda: process.poll() is not None or (search.begun() and search.executions()), 400)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    begun = search.begun()
    trials = search.finish()
    values = sorted(trial["values"]["router_lr"] for trial in trials)
    assert len(set(values)) == 2
    assert set(begun) <= set(values)
    assert trials[0]["fraction"] == 1.0
    done = search.executions()
    assert len(done) == len(set(done))  # what trials share, and what the killed search had begun, ran once


def test_optuna_samples_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = Search(tmp_path, GRID.replace("concurrency: 2", "concurrency: 1\n  sampler: optuna"))
    first = [trial["values"]["router_lr"] for trial in search.finish()]
    assert len(set(first)) == 2
    assert sorted(trial["values"]["router_lr"] for trial in search.finish()) == sorted(first)
