"""What is exported loads in transformers with equal logits, or is refused by name: every preset, variant, backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.convert import export_checkpoint, import_checkpoint
from jobs.models.layouts import public_layout
from jobs.models.weights import weights_sha256
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.catalog.routers import ROUTERS
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from tests.public_models import IDS, VOCAB

VARIANTS = [(preset, variant) for preset, kind in ROUTERS.builtins.items() for variant in kind.variants]
# What an architecture of transformers computes, by our backbone's attention; everything else is refused.
EXPORTED = {
    "olmoe": {"olmoe", "smoe"},
    "deepseek_moe": {"dense", "deepseek_moe 16b", "deepseek_moe v2", "deepseek_moe v3", "sharede_v2", "smoe"},
    "llama": {"dense", "deepseek_moe 16b", "deepseek_moe v2", "deepseek_moe v3", "sharede_v2", "smoe"},
}


def model_of(backbone: str, moe: MoESpec, **fields: Any) -> CausalLM:
    """Return a model with random weights: wide ones, so that a difference shows, and fp32 rounds far below it."""
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, hidden_size=32, num_layers=2, init_std=0.2, moe=moe, **fields)
    return build_model(spec, VOCAB).eval()


@torch.no_grad()
def same_in_transformers(model: CausalLM, folder: Path) -> Any:
    """Export `model` to `folder`, compare the logits of what transformers loads from there, and return that."""
    export_checkpoint(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    return theirs


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("preset, variant", VARIANTS)
def test_an_export_computes_the_same_in_transformers_or_is_refused_by_name(
    preset: str, variant: str, backbone: str, tmp_path: Path
) -> None:
    sparse: dict[str, Any] = {} if preset == "dense" else {"top_k": 3, "num_experts": 8}
    model = model_of(backbone, MoESpec(preset=preset, variant=variant, expert_width=12, **sparse))
    if f"{preset} {variant}".strip() in EXPORTED[backbone]:
        same_in_transformers(model, tmp_path / "out")
        return
    with pytest.raises(
        MoegridError, match=f"preset '{preset}' on backbone '{backbone}' has no public layout"
    ) as raised:
        export_checkpoint(model, tmp_path / "out")
    assert "no architecture of transformers has" in raised.value.cause
    assert raised.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, of_moe",
    [
        ({"dense_layers": 1, "dense_width": 40}, {}),
        ({"dense_layers": 1, "dense_width": 40, "tie_embeddings": True, "num_kv_heads": 2}, {"renormalise": True}),
        ({"rope_theta": 5e5, "norm_eps": 1e-3}, {"routed_scaling": 2.5}),
        ({}, {"shared_experts": 1, "top_k": 1}),
    ],
)
def test_a_deepseek_moe_goes_out_and_comes_back(fields: dict[str, Any], of_moe: dict[str, Any], tmp_path: Path) -> None:
    moe = MoESpec(preset="deepseek_moe", **{"top_k": 3, "num_experts": 8, "expert_width": 12, **of_moe})
    model = model_of("deepseek_moe", moe, **fields)
    assert type(same_in_transformers(model, tmp_path)).__name__ == "Qwen2MoeForCausalLM"
    before = torch.get_rng_state()
    again = import_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn that a checkpoint overwrites
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    if not moe.routed_scaling:
        assert weights_sha256(again) == weights_sha256(model)


def test_a_gated_shared_expert_is_not_taken_for_ours(tmp_path: Path) -> None:
    export_checkpoint(model_of("deepseek_moe", MoESpec(preset="deepseek_moe", expert_width=12)), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.shared_expert_gate.weight"] += 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MoegridError, match="cannot be imported") as raised:
        import_checkpoint(tmp_path)
    assert "shared_expert_gate.weight is not zero" in raised.value.cause


@pytest.mark.parametrize(
    "backbone, of_moe, named",
    [
        ("olmoe", {"shared_experts": 1}, "shared_experts 1"),
        ("olmoe", {"routed_scaling": 2.0}, "routed_scaling 2.0"),
        ("olmoe", {"expert": "relu_mlp"}, "expert 'relu_mlp'"),
        ("llama", {"renormalise": False}, "renormalise False without shared experts"),
        ("deepseek_moe", {"shared_experts": 1, "combine": "weighted"}, "combine 'weighted'"),
        ("deepseek_moe", {"n_group": 2, "topk_group": 1}, "n_group 2"),
        ("llama", {"choice": "expert"}, "choice 'expert'"),
    ],
)
def test_what_transformers_lacks_is_named(backbone: str, of_moe: dict[str, Any], named: str) -> None:
    with pytest.raises(MoegridError, match="has no public layout") as raised:
        public_layout(resolve_model(ModelSpec(backbone=backbone, moe=MoESpec(preset="smoe", **of_moe))))
    assert named in raised.value.cause


def test_a_factor_that_weights_would_round_is_refused(tmp_path: Path) -> None:
    moe = MoESpec(preset="deepseek_moe", expert_width=12, routed_scaling=2.5)
    model = model_of("deepseek_moe", moe).to(torch.bfloat16)
    with pytest.raises(MoegridError, match=r"routed_scaling 2\.5 cannot be exported in bfloat16"):
        export_checkpoint(model, tmp_path)
