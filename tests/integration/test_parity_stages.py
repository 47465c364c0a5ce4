"""Algorithms inside real stages: what a router learns besides its weights is saved, resumed and kept when frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.plan.phases import before_finetuning
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import TrainWork
from orchestrator.store import Store
from tests.training import MODEL, TRAIN, init_work, prepare, run_chain, segments, state_bits

MOE = dataclasses.replace(MODEL.moe, num_experts=8)


def router_state(store: Store, work: TrainWork, directory: Path) -> dict[str, torch.Tensor]:
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    directory.mkdir(exist_ok=True)
    state = load_file(store.artifacts.fetch(manifest, "weights.safetensors", directory))
    prefix = "backbone.model.layers.0.mlp.block.router."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("preset", ["c2r", "smoe"])
def test_c2r_lists_are_made_when_fine_tuning_begins_and_survive_a_cut(preset: str, tmp_path: Path) -> None:
    model = resolve_model(dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, preset=preset, collaboration_top=3)))
    train = dataclasses.replace(TRAIN, steps=4)
    results = []
    for cuts in ([("", 0, 4)], [("", 0, 2), ("", 2, 4)]):
        store = prepare(str(tmp_path / f"store{len(cuts)}"))
        base = segments([("", 0, 4)], train, model=model)
        tuned = segments(cuts, train, model=model, phase="finetune", tokens="instructions", after=base[-1])
        run_chain(store, [init_work(before_finetuning(model)), *base, *tuned])
        before = router_state(store, base[-1], tmp_path / "before").get("allowed")
        after = router_state(store, tuned[-1], tmp_path / "after")["allowed"]
        if preset == "c2r":
            assert before is not None
            assert before.all(), "pretraining is not limited"
        else:
            assert before is None, "pretraining is that of the model without the limit"
        assert (after.sum(1) == 3).all()
        results.append(state_bits(store, tuned[-1].key()))
    assert results[0] == results[1]


@pytest.mark.parametrize("preset", ["aux_free", "expert_choice"])
def test_a_frozen_router_keeps_its_bias_and_its_thresholds(preset: str, tmp_path: Path) -> None:
    select: dict[str, Any] = (
        {"train_select": "threshold", "eval_select": "threshold"} if preset == "expert_choice" else {}
    )
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, preset=preset, **select))
    train = dataclasses.replace(TRAIN, steps=5, balance=BalanceSpec(bias_rate=0.01))
    store = prepare(str(tmp_path / "store"))
    works = segments([("", 0, 3), ("router", 3, 4), ("", 4, 5)], train, model=model)
    run_chain(store, [init_work(model), *works])
    states = [router_state(store, work, tmp_path / str(work.stop)) for work in works]
    moved = "bias" if preset == "aux_free" else "threshold"
    assert states[0][moved].any()
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[1][moved], states[2][moved])
