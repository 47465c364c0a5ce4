"""Parts of a block under interventions, in updates without gradients, in training and evaluation; a package's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.moe import build_block
from jobs.moe.interventions import dropped, pruned, random_routing, temperature
from orchestrator.catalog.routers import kind_of
from orchestrator.plan.cost import parameters
from orchestrator.spec import versions
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.resolve import block_spec, is_causal, resolve_model
from tests.packages import found, install
from tests.unit.test_moe_matrix import PARTS, SIZES

D, VOCAB = 16, 32
SWITCHES = {
    "pruned": lambda block: pruned(block, {0: [0, 1]}),
    "random": lambda block: random_routing(block, 3),
    "dropped": lambda block: dropped(block, 1),
    "temperature": lambda block: temperature(block, 0.5),
}


def built(fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_block({**SIZES, "router_init_std": 1.0, **fields}, hidden_size=D, vocab_size=VOCAB)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=generator)
    return {"x_BSD": torch.randn(2, 12, D, generator=generator), "tokens": tokens}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("fields", PARTS, ids=str)
def test_interventions_hold_with_every_part(fields: dict[str, Any], switch: str) -> None:
    block = built(fields).eval()
    with SWITCHES[switch](block):
        y, routing = block(**inputs())
    assert torch.isfinite(y).all()
    assert (routing.weights[routing.indices < 0] == 0).all()
    if switch == "pruned":
        assert not routing.expert_counts()[:2].any()
    filled = routing.expert_indices().sort(1).values
    assert not ((filled[:, 1:] == filled[:, :-1]) & (filled[:, 1:] >= 0)).any(), "an expert twice"


@pytest.mark.parametrize("fields", PARTS, ids=str)
def test_an_evaluation_draws_nothing(fields: dict[str, Any]) -> None:
    block = built(fields).eval()
    first = block(**inputs())[0]
    torch.manual_seed(5)
    assert torch.equal(block(**inputs())[0], first)


@pytest.mark.parametrize("preset", ["moepp", "zaya"])
def test_a_balancing_bias_moves_experts_alone(preset: str) -> None:
    block = built({"preset": preset, "balance_bias": True})
    before, experts = block.router.bias.clone(), SIZES["num_experts"]
    counts = torch.arange(block.router.num_ids) * 10
    block.update_balance_bias(counts, 0.5, center=False)
    moved = block.router.bias - before
    assert moved[:experts].tolist() == [0.5] * 4 + [-0.5] * 4
    assert not moved[experts:].any()


def test_hashed_layers_take_the_same_experts_for_a_token_id_and_others_their_scores() -> None:
    from jobs.models.building import build_model

    moe = block_spec({**SIZES, "preset": "aux_free", "hash_layers": 1})
    model = build_model(ModelSpec(hidden_size=D, num_layers=3, num_heads=2, num_kv_heads=2, moe=moe), VOCAB).eval()
    ids = torch.tensor([[5, 7, 5, 9, 5]])
    first, second, _ = model(ids).routings
    chosen = first.indices.sort(1).values
    table: Any = model.moe_blocks[0].router.table
    assert torch.equal(chosen, table[ids[0]].sort(1).values)
    assert torch.equal(chosen[0], chosen[2])
    assert len(table.sort(1).values.unique(dim=0)) > 15
    assert not torch.equal(second.indices.sort(1).values, table[ids[0]].sort(1).values)
    assert [hasattr(block.router, "bias") for block in model.moe_blocks] == [False, True, True]


def test_capacity_and_mixed_keys_are_not_causal() -> None:
    for fields in PARTS:
        moe = block_spec({**SIZES, **fields})
        looks = fields.get("overflow") == "capacity" or fields.get("gate") == "product_keys_mixed"
        assert kind_of(moe).causal
        assert is_causal(moe) is not looks


MODULE = """
import torch

from orchestrator.catalog.frames import FrameKind
from orchestrator.catalog.overflows import OverflowKind


class Gain(torch.nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.empty(width))

    def reset_parameters(self, std):
        torch.nn.init.ones_(self.gain)

    def forward(self, x):
        return x * self.gain


def first_choice(asked):
    kept = torch.zeros_like(asked.indices, dtype=torch.bool)
    kept[:, 0] = True
    return kept


GAIN = FrameKind("gain", "around:Gain", parameter_count=lambda width: width)
FIRST = OverflowKind("first_choice", "around:first_choice", causal=True)
"""


def test_a_package_brings_a_frame_and_an_overflow(tmp_path: Path) -> None:
    from jobs.models.building import build_model

    entries = {"frames": {"gain": "around:GAIN"}, "overflows": {"first_choice": "around:FIRST"}}
    install(tmp_path / "site", "around", MODULE, entries)
    with found(tmp_path / "site", "around"):
        moe = block_spec({**SIZES, "block_output": "gain", "overflow": "first_choice"})
        spec = resolve_model(ModelSpec(hidden_size=D, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe))
        model = build_model(spec, VOCAB)
        assert parameters(spec, VOCAB).total == sum(parameter.numel() for parameter in model.parameters())
        output = model(torch.arange(8).view(1, 8))
        assert [int(routing.counts.sum()) for routing in output.routings] == [8, 8]
        assert {"frame gain", "overflow first_choice"} <= versions.raised(versions.of_model(spec)).keys()
        assert is_causal(moe)


@pytest.mark.parametrize("fields", [{}, {"weight_norm": 2.0}])
def test_a_token_whose_scores_all_round_to_zero_has_finite_gradients(fields: dict[str, Any]) -> None:
    """Logits below -104 have a sigmoid of 0: nothing is weighed, and nothing becomes NaN."""
    block = built({"preset": "smoe", "score": "sigmoid", **fields})
    torch.nn.init.constant_(block.router.weight, -50.0)
    x = torch.ones(1, 3, D).requires_grad_()
    y, _ = block(x)
    (1e9 * y).sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(block.router.weight.grad).all()


def test_hashed_layers_rank_equal_experts_by_their_index() -> None:
    block = built({"preset": "smoe", "hash_layers": 1})
    torch.nn.init.zeros_(block.router.weight)
    _, routing = block(**inputs())
    assert torch.equal(routing.indices, routing.indices.sort(-1).values)
    assert not torch.equal(block.router.table, block.router.table.sort(-1).values)
