"""The plan counts a model's parameters to the last one: every preset and variant, expert form and backbone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.routers import ROUTERS
from orchestrator.plan.cost import parameters
from orchestrator.spec.model import CHOICES, ModelSpec, MoESpec
from orchestrator.spec.resolve import block_spec, resolve_model
from tests.unit.test_moe_matrix import PARTS

VOCAB = 64
SHAPE: dict[str, Any] = {"hidden_size": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
BLOCK: dict[str, Any] = {"num_experts": 6, "top_k": 2, "expert_width": 10}
VARIANTS = [(preset, variant) for preset, kind in ROUTERS.builtins.items() for variant in kind.variants]


def same(spec: ModelSpec) -> None:
    model = resolve_model(spec)
    built: Counter[str] = Counter()
    for _, parameter, role in parameter_roles(build_model(model, VOCAB)):
        built[role] += parameter.numel()
    assert parameters(model, VOCAB).total == built.total()
    counted = Counter(parameters(model, VOCAB).roles)
    # What a router brings beside the experts counts as its own, also where it takes an expert's place.
    for roles in (built, counted):
        roles["routed_expert"] += roles.pop("router", 0)
    assert +counted == +built


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("preset", "variant"), VARIANTS)
def test_of_every_preset_and_variant(preset: str, variant: str, backbone: str) -> None:
    moe = MoESpec(preset=preset, variant=variant, **BLOCK)
    dense = int(backbone == "deepseek_moe")
    same(ModelSpec(backbone=backbone, dense_layers=dense, dense_width=20 * dense, moe=moe, **SHAPE))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expert", CHOICES["expert"])
@pytest.mark.parametrize("preset", ["smoe", "dense", "sharede_v2"])
def test_of_every_expert_form(preset: str, expert: str, tied: bool) -> None:
    same(ModelSpec(moe=MoESpec(preset=preset, expert=expert, **BLOCK), tie_embeddings=tied, **SHAPE))


@pytest.mark.parametrize(
    "fields",
    [
        {"gating_layers": 2},
        {"gating_residual": False},
        {"gating_layers": 2, "gating_residual": False, "constant_experts": 0},
        {"zero_experts": 3, "copy_experts": 2},
    ],
)
def test_of_what_moepp_may_leave_out(fields: dict[str, Any]) -> None:
    same(ModelSpec(moe=MoESpec(preset="moepp", **BLOCK, **fields), **SHAPE))


@pytest.mark.parametrize("fields", PARTS, ids=str)
def test_of_every_part(fields: dict[str, Any]) -> None:
    same(ModelSpec(moe=block_spec({**BLOCK, "num_experts": 8, **fields}), **SHAPE))


@pytest.mark.parametrize(
    "around",
    [
        {"head_dim": 10, "qk_norm": "head"},
        {"head_dim": 10, "qk_norm": "full", "attention_bias": "qkv", "backbone": "llama"},
        {"attention_bias": "all", "backbone": "deepseek_moe"},
    ],
)
@pytest.mark.parametrize("block", [{}, {"shared_experts": 2, "shared_gate": True, "shared_expert": "relu_mlp"}])
def test_of_the_parts_of_attention_and_of_shared_experts(around: dict[str, Any], block: dict[str, Any]) -> None:
    same(ModelSpec(moe=MoESpec(**BLOCK, **block), **SHAPE, **around))
