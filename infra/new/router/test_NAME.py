"""The router NAME: `python -m pytest test_NAME.py`."""

from pathlib import Path

import pytest
import torch
from moegrid.extend import MoegridError, build_block, load_plugin

KIND = load_plugin(Path(__file__).with_name("NAME"))["preset NAME"]
SHAPE = {"preset": "NAME", "top_k": 2, "num_experts": 4, "expert_width": 8, "hidden_size": 16}


def test_every_token_has_its_experts_and_the_router_learns() -> None:
    torch.manual_seed(0)
    block = build_block(SHAPE)
    output, routing = block(torch.randn(2, 5, 16))
    output.square().mean().backward()
    assert output.shape == (2, 5, 16)
    assert routing.counts.sum() == 2 * 5 * 2
    assert all(one.grad is not None for one in block.router.parameters())


def test_the_plan_counts_its_parameters() -> None:
    block = build_block(SHAPE)
    counted = sum(one.numel() for one in block.router.parameters())
    assert KIND.count(block.router.moe, 16, first=True) == counted


def test_its_parameter_sharpens_the_scores() -> None:
    flat, sharp = (build_block({**SHAPE, "parameters": {"scale": scale}}) for scale in (1.0, 50.0))
    sharp.load_state_dict({**flat.state_dict(), "router.scale": torch.full((4,), 50.0)})
    tokens = torch.randn(1, 20, 16)
    assert sharp(tokens)[1].scores.max(-1).values.mean() > flat(tokens)[1].scores.max(-1).values.mean()
    with pytest.raises(MoegridError, match="scale must be above 0"):
        build_block({**SHAPE, "parameters": {"scale": 0.0}})
