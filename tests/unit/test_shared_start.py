"""Shared experts that start as a dense model's feed-forward, in a model that is drawn otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs.models.building import empty_model
from jobs.models.shared_start import with_shared
from jobs.models.upcycle import initial_model
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.validity import model_problems
from tests.public_models import VOCAB, llama_in

MODEL = ModelSpec(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    context=64,
    moe=MoESpec(preset="sharede_v2", top_k=2, num_experts=4, expert_width=24, shared_experts=2),
)


def drawn(spec: ModelSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(initial_model(spec, VOCAB).state_dict())


def test_the_shared_experts_are_the_feed_forward_and_all_else_is_what_it_was(tmp_path: Path) -> None:
    dense = llama_in(tmp_path)
    plain = drawn(MODEL)
    filled = dict(with_shared(empty_model(MODEL, VOCAB), iter(plain.items()), str(tmp_path)))
    other = {name for name in plain if not torch.equal(plain[name], filled[name])}
    assert other == {name for name in plain if ".shared." in name}
    assert len(other) == 2 * 3
    for layer, block in enumerate(dense.model.layers):
        for part in ("gate", "up", "down"):
            (name,) = (name for name in other if f"layers.{layer}." in name and name.endswith(part))
            assert torch.equal(filled[name], getattr(block.mlp, f"{part}_proj").weight), "48 units, as 2 x 24"


def test_other_widths_are_refused(tmp_path: Path) -> None:
    llama_in(tmp_path)
    wrong = empty_model(dataclasses.replace(MODEL, hidden_size=64), VOCAB)
    with pytest.raises(MoegridError, match="does not fit the shared experts"):
        list(with_shared(wrong, iter(()), str(tmp_path)))


def test_what_cannot_be_is_told_by_the_plan() -> None:
    def told(spec: ModelSpec) -> str:
        return "; ".join(fault.message for fault in model_problems(spec) if fault.field == "shared_from")

    sound = dataclasses.replace(MODEL, shared_from="hub://ORG/NAME")
    assert told(sound) == ""
    plain = MoESpec(preset="smoe", top_k=2, num_experts=4, expert_width=24)
    assert "needs shared_experts" in told(dataclasses.replace(sound, moe=plain))
    other = dataclasses.replace(MODEL.moe, expert="relu_mlp")
    assert "needs expert 'swiglu'" in told(dataclasses.replace(sound, moe=other))
    assert "a model that is drawn" in told(dataclasses.replace(sound, checkpoint="hub://ORG/NAME"))
    assert "neither wheel" in told(dataclasses.replace(MODEL, shared_from="/data/dense"))
