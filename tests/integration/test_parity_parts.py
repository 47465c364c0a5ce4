"""Parts of public blocks beyond the first ones: our block gives transformers' outputs and gradients (fp32, 1e-5)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere2_moe import modeling_cohere2_moe as cohere2
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.glm5_next import modeling_glm5_next as glm5
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.hy_v4 import modeling_hy_v4 as hy_v4
from transformers.models.laguna import modeling_laguna as laguna
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as minimax
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from jobs.moe import build_block

D, F, N, K = 48, 24, 8, 3
TOLERANCE = 1e-5
COMMON: dict[str, Any] = {"hidden_size": D, "num_experts": N, "top_k": K, "expert_width": F}


def configured(**fields: object) -> SimpleNamespace:
    """Return a configuration with the fields that a block reads."""
    common = {
        "hidden_size": D,
        "moe_intermediate_size": F,
        "intermediate_size": F,
        "num_experts": N,
        "num_local_experts": N,
        "n_routed_experts": N,
        "num_experts_per_tok": K,
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "_experts_implementation": "eager",
        "mlp_bias": False,
    }
    return SimpleNamespace(**{**common, **fields})


def random_weights(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3, generator=generator)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Compare relative to the largest value, where that is above 1."""
    difference = (ours.detach() - theirs.detach()).abs().max() / max(1.0, float(theirs.detach().abs().max()))
    assert float(difference) <= TOLERANCE


def compare(spec: dict[str, Any], reference: nn.Module, pairs: dict[str, Tensor]) -> None:
    """Load `pairs` (our name -> the reference's), compare output, its gradient by the input, and the router's.

    `pairs` hold tensors of the reference, or halves of them.
    """
    block = build_block({**COMMON, **spec})
    assert block.named_weights().keys() == pairs.keys()
    block.load_named({name: tensor.detach() for name, tensor in pairs.items()})
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, 19, D, generator=generator) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = block(ours)[0]
    expected = reference(theirs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(y, expected)
    (y * target).sum().backward()
    (expected * target).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    close(ours.grad, theirs.grad)
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    compared = 0
    for name, tensor in pairs.items():
        if name.startswith(("router.", "shared")) and tensor.is_leaf and tensor.grad is not None:
            gradient = gradients[name]
            assert gradient is not None
            close(gradient, tensor.grad)
            compared += 1
    assert compared


def experts_of(experts: Any) -> dict[str, Tensor]:
    fused = experts.gate_up_proj
    return {"experts.gate": fused[:, :F], "experts.up": fused[:, F:], "experts.down": experts.down_proj}


def shared_of(shared: Any) -> dict[str, Tensor]:
    if hasattr(shared, "gate_up_proj"):
        rows = shared.gate_up_proj.weight
        return {"shared.gate": rows[:F], "shared.up": rows[F:], "shared.down": shared.down_proj.weight}
    return {f"shared.{part}": getattr(shared, f"{part}_proj").weight for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "block, more",
    [(qwen2.Qwen2MoeSparseMoeBlock, {}), (qwen3_next.Qwen3NextSparseMoeBlock, {})],
    ids=["qwen2_moe", "qwen3_next"],
)
def test_a_gate_scales_the_shared_expert(block: type[nn.Module], more: dict[str, object]) -> None:
    reference = block(configured(shared_expert_intermediate_size=2 * F, **more))
    random_weights(reference)
    its: Any = reference
    compare(
        {"preset": "smoe", "shared_experts": 2, "shared_gate": True},
        reference,
        {
            "router.weight": its.gate.weight,
            **experts_of(its.experts),
            **shared_of(its.shared_expert),
            "shared_gate.weight": its.shared_expert_gate.weight,
        },
    )


def test_gpt_oss() -> None:
    reference = gpt_oss.GptOssMLP(configured(swiglu_alpha=1.702, swiglu_limit=0.7))
    random_weights(reference)
    experts = reference.experts
    fused, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    compare(
        {
            "preset": "smoe",
            "gate": "affine",
            "expert": "swiglu_shifted_bias",
            "expert_parameters": {"limit": 0.7},
        },
        reference,
        {
            "router.gate.weight": reference.router.weight,
            "router.gate.bias": reference.router.bias,
            "experts.gate": fused[:, ::2],
            "experts.up": fused[:, 1::2],
            "experts.gate_bias": bias[:, ::2],
            "experts.up_bias": bias[:, 1::2],
            "experts.down": experts.down_proj.transpose(1, 2),
            "experts.down_bias": experts.down_proj_bias,
        },
    )


def test_minimax_m3() -> None:
    config = configured(swiglu_alpha=1.3, swiglu_limit=0.8, shared_intermediate_size=F, routed_scaling_factor=1.5)
    reference = minimax.MiniMaxM3VLSparseMoeBlock(config)
    random_weights(reference)
    compare(
        {
            "preset": "aux_free",
            "expert": "swiglu_shifted",
            "expert_parameters": {"limit": 0.8, "alpha": 1.3},
            "shared_experts": 1,
            "routed_scaling": 1.5,
        },
        reference,
        {
            "router.weight": reference.gate.weight,
            "router.bias": reference.gate.e_score_correction_bias,
            **experts_of(reference.experts),
            **shared_of(reference.shared_experts),
        },
    )


@pytest.mark.parametrize("cap", [0.0, 0.6])
def test_laguna(cap: float) -> None:
    config = configured(
        moe_router_logit_softcapping=cap,
        shared_expert_intermediate_size=F,
        moe_routed_scaling_factor=1.7,
        moe_apply_router_weight_on_input=False,
    )
    reference = laguna.LagunaSparseMoeBlock(config)
    random_weights(reference)
    compare(
        {
            "preset": "aux_free",
            "gate": "affine",
            "gate_parameters": {"bias": False, "cap": cap},
            "shared_experts": 1,
            "routed_scaling": 1.7,
        },
        reference,
        {
            "router.gate.weight": reference.gate.weight,
            "router.bias": reference.gate.e_score_correction_bias,
            **experts_of(reference.experts),
            **shared_of(reference.shared_experts),
        },
    )


def test_deepseek_v4_without_hashed_layers() -> None:
    config = configured(
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        swiglu_limit=0.5,
        n_shared_experts=1,
        num_hash_layers=0,
        mlp_layer_types=["moe"],
    )
    reference = deepseek_v4.DeepseekV4SparseMoeBlock(config, 0)
    random_weights(reference)
    compare(
        {
            "preset": "aux_free",
            "score": "sqrt_softplus",
            "expert": "swiglu_clamped",
            "expert_parameters": {"limit": 0.5},
            "shared_experts": 1,
            "routed_scaling": 1.5,
        },
        reference,
        {
            "router.weight": reference.gate.weight,
            "router.bias": reference.gate.e_score_correction_bias,
            **experts_of(reference.experts),
            **shared_of(reference.shared_experts),
        },
    )


@pytest.mark.parametrize("block", [glm5.Glm5NextTextMoE, hy_v4.HYV4MoE], ids=["glm5_next", "hy_v4"])
def test_clamped_experts_of_glm_and_hunyuan(block: type[nn.Module]) -> None:
    config = configured(
        swiglu_limit=0.5,
        n_shared_experts=1,
        num_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
        router_scaling_factor=1.5,
        scoring_func="sigmoid",
        enable_moe_fp32_combine=False,
        route_norm=True,
    )
    reference: Any = block(config)
    random_weights(reference)
    bias = getattr(reference.gate, "e_score_correction_bias", None)
    bias = reference.e_score_correction_bias if bias is None else bias
    compare(
        {
            "preset": "aux_free",
            "expert": "swiglu_clamped",
            "expert_parameters": {"limit": 0.5},
            "shared_experts": 1,
            "shared_expert": "swiglu" if block is hy_v4.HYV4MoE else "",
            "routed_scaling": 1.5,
        },
        reference,
        {
            "router.weight": reference.gate.weight,
            "router.bias": bias,
            **experts_of(reference.experts),
            **shared_of(reference.shared_experts),
        },
    )


def test_the_average_of_routed_and_shared_experts() -> None:
    config = configured(
        num_shared_experts=2,
        shared_expert_combination_strategy="average",
        expert_selection_fn="softmax",
        prefix_dense_intermediate_size=F,
    )
    reference: Any = cohere2.Cohere2MoeSparseMoeBlock(config)
    random_weights(reference)
    compare(
        {"preset": "smoe", "shared_experts": 2, "combine": "average"},
        reference,
        {
            "router.weight": reference.gate.weight,
            **experts_of(reference.experts),
            **shared_of(reference.shared_experts),
        },
    )
