"""What is said of the weights that upcycling begins with is what a forward pass finds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.upcycle import upcycle
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_moe
from orchestrator.spec.upcycling import change_at_start

SPEC = ModelSpec(
    backbone="llama",
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    moe=MoESpec(preset="dense", top_k=1, num_experts=1, expert_width=48),
)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"routed_output": "bias", "expert_scale": True, "logit_std": 0.5, "gate": "mlp"}, ""),
        ({"routed_input": "rms_norm"}, "routed_input"),
        ({"block_output": "unit_rms_norm"}, "block_output"),
        ({"weights_on": "input"}, "weights multiply"),
        ({"weight_norm": 2.0}, "2-norm"),
        ({"overflow": "capacity", "overflow_parameters": {"factor": 1.0}}, "capacity"),
        ({"preset": "moepp", "zero_experts": 1, "copy_experts": 1, "constant_experts": 1}, "without a copy"),
        ({"routed_scaling": 2.0}, "multiplied by 2"),
        ({"renormalise": False}, "sum of its router"),
    ],
)
def test_what_differs_at_the_start_is_said(fields: dict[str, Any], said: str) -> None:
    torch.manual_seed(0)
    dense = build_model(SPEC, 64).eval()
    block = {"num_experts": 4, "top_k": 2, "expert_width": 48, "renormalise": True, "router_init_std": 0.5, **fields}
    spec = dataclasses.replace(SPEC, upcycle="copy", checkpoint="file://dense", moe=MoESpec(**block))
    model = upcycle(dense, spec).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before, after = dense(ids).logits, model(ids).logits
    same = bool((before - after).abs().max() <= 1e-5 * before.abs().max())
    found = change_at_start("copy", resolve_moe(spec.moe), spec.upcycling, 1)
    assert (found == "") == same == (said == "")
    assert said in found
