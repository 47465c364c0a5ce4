"""A search over router learning rates with fake stages: real Tune, real drivers, one store."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.ray_tune import rungs
from orchestrator.spec.search import Scheduler, SearchAxis, SearchSpec
from orchestrator.store import Store
from tests.faults.harness import HERE, SITE
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
  metric: lm_score
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
    assert rungs(SearchSpec((axis,), "m")) == (1.0,)
    assert rungs(SearchSpec((axis,), "m", scheduler=Scheduler("asha", 0.1, 3))) == pytest.approx((0.1, 0.3, 0.9, 1.0))


def test_trials_are_ordinary_cells_and_a_second_search_repeats_nothing(
    tmp_path: Path,
) -> None:
    if importlib.util.find_spec("ray") is None:
        lab_missing("Ray", "the package ray is not installed")
    grid, log = tmp_path / "lr_search.yaml", tmp_path / "executions.jsonl"
    grid.write_text(GRID)
    store = str(tmp_path / "store")
    words = ["run", str(grid), "--store", store, "--site", str(SITE), "--tracking", "none"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"MOEGRID_RUN_DIR": str(tmp_path / "run"), "FAKE_LOG": str(log), "PYTHONPATH": str(HERE.parents[1])}
    program = (sys.executable, str(HERE / "driver.py"))
    code = "import sys; from orchestrator import cli; from orchestrator.commands import search; "
    code += f"search.PROGRAM = {program}; sys.exit(cli.main({words!r}))"

    def run() -> dict[str, Any]:
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert answer.returncode == 0, answer.stderr
        found = Store.open(store).get_json("searches/lr_search.json")
        assert found is not None
        return dict(found)

    first = run()
    assert len(first["trials"]) == 2
    assert first["trials"][0]["fraction"] == 1.0
    assert len({trial["values"]["router_lr"] for trial in first["trials"]}) == 2
    done = [line["stage"] for line in map(json.loads, log.read_text().splitlines())]
    assert len(done) == len(set(done))  # what trials share ran once
    values = [sorted(trial["values"]["router_lr"] for trial in found["trials"]) for found in (first, run())]
    assert values[0] == values[1]
