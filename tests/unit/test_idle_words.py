"""Words that make a key and change nothing are told by the plan: which, where, why, and what computes the same."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from jobs.moe import build_block
from orchestrator.grid.idle import idle_words
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.plan.summary import to_json
from orchestrator.ui.console import Console
from orchestrator.ui.plan_view import show_plan

GRID = """
name: idle
description: words that change nothing beside others
base: pretrain
factors: %s
evaluate: [lm]
set: {pretrain.balance.z_coef: %s, model.moe.n_group: 4, model.moe.topk_group: 2}
"""


def cells(folder: Path, factors: str, z_coef: float = 0.001) -> str:
    path = folder / "idle.yaml"
    path.write_text(GRID % (factors, z_coef))
    return str(path)


@pytest.mark.parametrize(
    ("factors", "z_coef", "told"),
    [
        (
            "{temperature: [1.0, 0.5], z_after_temperature: [false, true]}",
            0.001,
            "model.moe.z_after_temperature: true changes nothing in 1 cell: temperature is 1 and logit_std is 0; "
            "'temperature=1.0 z_after_temperature=true' computes what 'temperature=1.0 z_after_temperature=false' does",
        ),
        (
            "{temperature: [1.0, 0.5], z_after_temperature: [true]}",
            0.0,
            "model.moe.z_after_temperature: true changes nothing in 2 cells: z_coef is 0",
        ),
        (
            "{group_mask: [exclude, zero], seed: [0, 1]}",
            0.001,
            "model.moe.group_mask: zero changes nothing in 2 cells: without balance_bias no expert is selected by less "
            "than 0; 'group_mask=zero seed=0' computes what 'group_mask=exclude seed=0' does (and 1 more)",
        ),
        ("{temperature: [0.5, 2.0], z_after_temperature: [false, true]}", 0.001, ""),
        ("{logit_std: [1.0], z_after_temperature: [false, true]}", 0.001, ""),
        ("{balance_bias: [true], group_mask: [exclude, zero]}", 0.001, ""),
    ],
)
def test_the_plan_tells_which_words_change_nothing(tmp_path: Path, factors: str, z_coef: float, told: str) -> None:
    path = cells(tmp_path, factors, z_coef)
    found = idle_words(load_grid(path).cells)
    assert [str(one) for one in found] == ([told] if told else [])
    plan = make_plan(build_graph(load_grid(path)), ())
    assert [row["told"] for row in to_json(plan)["idle"]] == ([told] if told else [])
    stream = io.StringIO()
    show_plan(plan, Console(stream))
    assert ("changes nothing" in stream.getvalue()) == bool(told)


@pytest.mark.parametrize("changes", [{"z_after_temperature": True}, {"group_mask": "zero"}])
def test_what_is_told_to_change_nothing_changes_no_bit(changes: dict[str, object]) -> None:
    plain = {"top_k": 2, "num_experts": 8, "expert_width": 16, "n_group": 4, "topk_group": 2}
    blocks = []
    for words in ({}, changes):
        torch.manual_seed(0)
        blocks.append(build_block({**plain, **words}, hidden_size=32))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    (one, first), (two, second) = (block(x) for block in blocks)
    assert torch.equal(one, two)
    ours, theirs = first.losses(), second.losses()
    assert "z_loss" in ours
    assert all(torch.equal(loss, theirs[name]) for name, loss in ours.items())
