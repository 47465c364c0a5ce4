"""One package brings data, an optimizer, a freeze rule and a schedule: a grid of it trains without an edit of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import books, lion
from tests.packages import install
from tests.small_grid import moegrid, weights

PLATEAU = """

from orchestrator.catalog.schedules import ScheduleKind


def plateau(done, train, parameters):
    return min(1.0, 2 * (1 - done))


PLATEAU = ScheduleKind("plateau", "lions:plateau")
"""
GRID = """
name: small
base: finetune
factors: {freeze: [none, none->lower], optimizer_parameters.fast: [0.8, 0.9]}
baseline: {freeze: none}
evaluate: [lm]
at: [1.0]
set:
  model: {hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, active_width: 32}
  model.moe: {top_k: 2, num_experts: 4}
  tokenizer.vocab_size: 300
  evaluate.val_tokens: 2048
  pretrain: {steps: 4, micro_batch: 2, sequence_length: 64, schedule: plateau}
  pretrain.data: {source: "books://primer", holdout: 0.2}
  finetune: {steps: 6, micro_batch: 2, accumulation: 1, sequence_length: 64, optimizer: lion, lr: 1e-4}
  finetune.data: {source: "books://novel", holdout: 0.2}
"""


def test_a_grid_of_another_packages_parts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path / "site",
        "lions",
        lion.LION + PLATEAU,
        {**lion.NAMES, "schedules": {"plateau": "lions:PLATEAU"}},
    )
    install(tmp_path / "site", "books", books.BOOKS, books.NAMES)
    path = os.pathsep.join(filter(None, (str(tmp_path / "site"), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PYTHONPATH", path)
    grid, store = tmp_path / "small.yaml", tmp_path / "store"
    grid.write_text(GRID)
    plan = json.loads(moegrid("plan", str(grid), "--store", str(store), "--json"))
    assert {one["provider"]: one["version"] for one in plan["plugins"]} == {"books": "1.2", "lions": "1.2"}
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none", "--no-report")
    found = weights(grid, store)
    assert len({sha for sha, _ in found.values()}) == 4, sorted(found)
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none", "--no-report")
    jobs = list(store.glob("submissions/*.json"))
    assert weights(grid, store) == found
    assert any("optimizer_parameters" in json.dumps(json.loads(job.read_text())) for job in jobs)
