"""Recipes of upcycling: in fp32 the dense model's outputs at step 0, or the change that is stated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.models.convert import import_checkpoint
from jobs.models.sources import open_checkpoint
from jobs.models.upcycle import initial_model, said_of_start
from orchestrator.errors import MoegridError
from orchestrator.spec.model import MoESpec
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.upcycling import UpcyclingSpec
from orchestrator.spec.validity import model_problems
from tests.public_models import IDS, VOCAB, llama_in

WIDTH = 48  # of the dense feed-forward
WHOLE = {"expert_width": WIDTH, "num_experts": 4, "top_k": 2}
NARROW = {"expert_width": WIDTH // 4, "num_experts": 16, "top_k": 8}
GROUPS = {"groups": True, "scale_weights": True}
RAW = {"renormalise": False, "router_init_std": 0.0}


def upcycled(folder: Path, how: str, moe: dict[str, Any], given: dict[str, Any]) -> Any:
    dense = spec_of(open_checkpoint(folder).config)
    block = MoESpec(preset="smoe", **moe)
    return dataclasses.replace(dense, checkpoint=str(folder), upcycle=how, moe=block, upcycling=UpcyclingSpec(**given))


def outputs(spec: Any, seed: int = 0) -> torch.Tensor:
    logits = initial_model(spec, VOCAB, seed).eval()(IDS).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize(
    "moe, given",
    [
        (WHOLE, {}),
        ({**WHOLE, **RAW}, {"scale_weights": True}),
        ({**WHOLE, "routed_scaling": 2.5}, {"scale_weights": True}),
        (NARROW, GROUPS),
        ({**NARROW, "top_k": 4}, GROUPS),
        ({**NARROW, "num_experts": 8, "top_k": 8}, GROUPS),
        ({**NARROW, **RAW, "top_k": 12}, GROUPS),
        ({**NARROW, "score": "sigmoid"}, GROUPS),
    ],
)
@torch.no_grad()
def test_outputs_at_step_0_are_those_of_the_dense_model(
    tmp_path: Path, moe: dict[str, Any], given: dict[str, Any]
) -> None:
    llama_in(tmp_path)
    spec = upcycled(tmp_path, "copy", moe, given)
    assert not model_problems(spec)
    assert said_of_start(resolve_model(spec)) == "the same outputs"
    dense = import_checkpoint(tmp_path).eval()(IDS).logits
    assert dense is not None
    for seed in (0, 1):
        torch.testing.assert_close(outputs(spec, seed), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how, moe, given, said",
    [
        ("partial", WHOLE, {}, "50% of each expert's hidden units"),
        ("partial", WHOLE, {"redrawn": 0.25}, "25% of each expert's hidden units"),
        ("copy", WHOLE, {"noise": 0.1}, "noise of 0.1 standard deviations"),
        ("shared_only", {**WHOLE, "shared_experts": 1}, {}, "the shared experts hold the feed-forward"),
        ("copy", NARROW, {"scale_weights": True}, "hold any 8 of the 4 segments"),
        ("copy", NARROW, {"groups": True}, "is 1/4 of the feed-forward's"),
        ("copy", {**WHOLE, "renormalise": False}, {}, "the sum of its router's weights times that"),
        ("copy", {**WHOLE, "renormalise": False}, {"scale_weights": True}, "on average that"),
        ("copy", {**WHOLE, "routed_scaling": 2.5}, {}, "multiplied by 2.5"),
    ],
)
@torch.no_grad()
def test_a_change_at_step_0_is_stated(
    tmp_path: Path, how: str, moe: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    llama_in(tmp_path)
    spec = upcycled(tmp_path, how, moe, given)
    assert said in said_of_start(resolve_model(spec))
    dense = import_checkpoint(tmp_path).eval()(IDS).logits
    assert dense is not None
    assert (outputs(spec) - dense).abs().max() > 1e-4


@torch.no_grad()
def test_noise_has_the_size_that_is_asked_for_and_other_noise_for_each_expert(tmp_path: Path) -> None:
    llama_in(tmp_path)
    plain, noisy = (
        initial_model(upcycled(tmp_path, "copy", WHOLE, given), VOCAB).moe_blocks[0].experts.up
        for given in ({}, {"noise": 0.1})
    )
    added = noisy - plain
    assert [float(one.std() / base.std()) for one, base in zip(added, plain, strict=True)] == pytest.approx(
        [0.1] * 4, rel=0.1
    )
    assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.1


def test_experts_of_a_virtual_group_hold_all_segments_and_share_a_row_of_the_router(tmp_path: Path) -> None:
    llama_in(tmp_path)
    block = initial_model(upcycled(tmp_path, "copy", NARROW, {"groups": True}), VOCAB).moe_blocks[1]
    dense = dict(import_checkpoint(tmp_path).named_parameters())["backbone.model.layers.1.mlp.block.ffn.up"]
    for group in range(4):
        experts = slice(4 * group, 4 * group + 4)
        assert torch.equal(block.experts.up[experts, NARROW["expert_width"] :].flatten(0, 1), dense)
        assert len(block.router.weight[experts].unique(dim=0)) == 1
    assert len(block.router.weight.unique(dim=0)) == 4


@pytest.mark.parametrize(
    "moe, given, said",
    [
        ({**NARROW, "top_k": 6}, {"groups": True}, "takes no whole virtual groups"),
        ({**NARROW, "num_experts": 14}, {"groups": True}, "do not divide 14 experts"),
        ({**WHOLE, "expert_width": 20}, {}, "does not divide"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    tmp_path: Path, moe: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    llama_in(tmp_path)
    with pytest.raises(MoegridError, match=said):
        initial_model(upcycled(tmp_path, "copy", moe, given), VOCAB)
