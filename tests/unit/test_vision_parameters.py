"""The parameters of a vision side are counted from its shape, to the last one, by role and by component."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import pytest

from jobs.models.building import empty_model
from jobs.models.roles import parameter_roles
from orchestrator.plan.cost import parameters, picture_flops
from orchestrator.plan.sight import by_component, of_connector, of_encoder
from orchestrator.spec.model import MoESpec
from orchestrator.spec.resolve import resolve_moe
from orchestrator.spec.vision import VisionSpec
from tests.seeing import SEES, VISION

PRESETS = (
    MoESpec(preset="dense", top_k=1, num_experts=1, expert_width=32),
    *(
        MoESpec(preset=name, top_k=3, num_experts=6, expert_width=32)
        for name in ("smoe", "xmoe", "sigma_moe", "moepp", "tc_moe")
    ),
    *(MoESpec(preset=name, top_k=2, num_experts=5, expert_width=32) for name in ("sharede_v2", "sharede_v3")),
)


def told(roles: Mapping[str, int]) -> dict[str, int]:
    """Return counts by role; a router's count has what it brings, such as MoE++'s constants, which are experts."""
    both = Counter({role: count for role, count in roles.items() if count and role != "router"})
    both["routed_expert"] += roles.get("router", 0)
    return dict(+both)


@pytest.mark.parametrize("moe", PRESETS, ids=lambda moe: moe.preset)
@pytest.mark.parametrize("vision", [VISION, dataclasses.replace(VISION, train="connector", encoder="siglip")])
def test_counts_are_those_of_the_model(moe: MoESpec, vision: VisionSpec) -> None:
    spec = dataclasses.replace(SEES, moe=resolve_moe(moe), vision=vision)
    model = empty_model(spec, 64)
    found: Counter[str] = Counter()
    parts: dict[str, Counter[str]] = {"encoder": Counter(), "connector": Counter()}
    for name, parameter, role in parameter_roles(model):
        found[role] += parameter.numel()
        if name.startswith("vision."):
            parts[name.split(".")[1]][role] += parameter.numel()
    assert told(parameters(spec, 64).roles) == told(found)
    assert told(of_encoder(spec)) == told(parts["encoder"])
    assert told(of_connector(spec)) == told(parts["connector"])
    counted = by_component(spec, parameters(spec, 64).total)
    seeing = {part: sum(roles.values()) for part, roles in parts.items()}
    assert counted == {**seeing, "language": sum(found.values()) - sum(seeing.values())}


def test_a_picture_whose_features_are_known_costs_less() -> None:
    whole, known = (picture_flops(SEES, 64, encoded=encoded) for encoded in (True, False))
    per_patch = 2 * (4 * 16 * 16 + 3 * (2 * 16 * 32 + 16 + 32))
    assert whole - known == 16 * 2 * per_patch
