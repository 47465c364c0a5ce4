"""Muon and adapters where ranks hold rows: the curve of one process, equal bits resumed, other numbers of ranks."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.spec.cell import Resources
from orchestrator.spec.training import AdapterSpec
from orchestrator.store import Store
from tests.integration.test_training_ranks import FOUR, LONG, TWO, fresh, losses, run
from tests.training import MODEL, segments, state_bits, tensors

SHARED = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="deepseek_moe", shared_experts=1))
TRAIN = dataclasses.replace(LONG, steps=20, weight_decay=0.1)
WORDS = {
    "muon": dataclasses.replace(TRAIN, optimizer="muon", lr=3e-3),
    "adapters": dataclasses.replace(TRAIN, adapter=AdapterSpec(3, 8.0, "attention+expert", "trained")),
}
CURVE = ("train/lm_loss", "train/grad_norm", "train/tokens")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed is absent")


@pytest.mark.parametrize(
    ("word", "engine", "resources"),
    [
        ("muon", "fsdp", TWO),
        ("adapters", "fsdp", TWO),
        # Only in the whole harness (make faults): they share their code with the above.
        pytest.param("muon", "fsdp shard 2 expert 2", FOUR, marks=pytest.mark.faults),
        pytest.param("adapters", "fsdp expert 2", TWO, marks=pytest.mark.faults),
        pytest.param("adapters", "deepspeed:2", TWO, marks=[needs_deepspeed, pytest.mark.faults]),
    ],
)
def test_ranks_that_hold_rows_train_as_one_process_does(
    tmp_path: Path, word: str, engine: str, resources: Resources
) -> None:
    works = segments((("", 0, 8), ("router", 8, 20)), WORDS[word], model=SHARED)
    one, straight, apart = (fresh(tmp_path, name, SHARED) for name in ("one", "straight", "apart"))
    run(one, works, "one-0", "torch", Resources())
    run(straight, works, "straight-0", engine, resources)
    curve = losses(one, works, CURVE)
    assert losses(straight, works, CURVE) == pytest.approx(curve, rel=1e-4)
    run(apart, works[:1], "apart-0", engine, resources)
    shutil.copytree(tmp_path / "apart", tmp_path / "other")
    run(apart, works[1:], "apart-1", engine, resources)
    assert state_bits(apart, works[1].key()) == state_bits(straight, works[1].key())
    other = Store.open(str(tmp_path / "other"))
    run(other, works[1:], "other-0", "torch", Resources(), allow_numerics=True)
    assert losses(other, works, CURVE) == pytest.approx(curve, rel=1e-4)
    # What is not trained keeps its bits, and its state.
    before, after = (tensors(straight, work.key(), "optimizer") for work in works)
    routers = [name for name in before if ".router." in name]
    assert routers
    assert all(torch.equal(before[name], after[name]) for name in routers)
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if word == "muon" else set())
