"""Our names of a public block's weights: {ours: tensor of theirs}, made of views so that gradients map alike.

`one` is what is added to a weight that is kept as a difference from 1; it is 0 where gradients stand in the weights'
places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

D, F, N, K = 48, 24, 8, 3
Pairs = dict[str, Tensor]
PairsOf = Callable[[Any, float], Pairs]


def first(owner: Any, *paths: str) -> Any:
    """Return the first attribute that there is, None when there is none."""
    for path in paths:
        found = owner
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def fused(experts: Any, width: int = F) -> Pairs:
    rows = experts.gate_up_proj
    return {"experts.gate": rows[:, :width], "experts.up": rows[:, width:], "experts.down": experts.down_proj}


def shared_of(mlp: Any) -> Pairs:
    if hasattr(mlp, "gate_up_proj"):
        rows = mlp.gate_up_proj.weight
        half = len(rows) // 2
        return {"shared.gate": rows[:half], "shared.up": rows[half:], "shared.down": mlp.down_proj.weight}
    return {f"shared.{part}": getattr(mlp, f"{part}_proj").weight for part in ("gate", "up", "down")}


def usual(block: Any, one: float) -> Pairs:
    """Return what most blocks have: a matrix and maybe a bias that selects, fused experts, shared ones, their gate."""
    gate = first(block, "gate", "router")
    pairs = {"router.weight": first(gate, "weight", "gate.weight", "wg.weight", "classifier.weight")}
    bias = first(gate, "e_score_correction_bias", "moe_statics.e_score_correction_bias")
    bias = first(block, "e_score_correction_bias", "expert_bias") if bias is None else bias
    if bias is not None:
        pairs["router.bias"] = bias.view(-1)
    pairs |= fused(block.experts)
    if (mlp := first(block, "shared_experts", "shared_expert", "shared_mlp")) is not None:
        pairs |= shared_of(mlp)
    if (of_shared := first(block, "shared_expert_gate")) is not None:
        pairs["shared_gate.weight"] = of_shared.weight
    return pairs


def transposed(block: Any, one: float) -> Pairs:
    """Aria, Llama 4: experts as (in, out)."""
    rows, shared = block.experts.gate_up_proj.transpose(1, 2), first(block, "shared_experts", "shared_expert")
    return {
        "router.weight": block.router.weight,
        "experts.gate": rows[:, :F],
        "experts.up": rows[:, F:],
        "experts.down": block.experts.down_proj.transpose(1, 2),
        **shared_of(shared),
    }


def axk1(block: Any, one: float) -> Pairs:
    return {**usual(block, one), "block_output.weight": block.post_mlp_layernorm.weight}


def dbrx(block: Any, one: float) -> Pairs:
    mlp = block.experts.mlp
    return {
        "router.weight": block.router.layer.weight,
        "experts.gate": mlp.w1.view(N, F, D),
        "experts.up": mlp.v1.view(N, F, D),
        "experts.down": mlp.w2.view(N, F, D).transpose(1, 2),
    }


def affine(block: Any, one: float) -> Pairs:
    pairs = usual(block, one)
    pairs["router.gate.weight"] = pairs.pop("router.weight")
    return pairs


def gpt_oss(block: Any, one: float) -> Pairs:
    experts = block.experts
    rows, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    return {
        "router.gate.weight": block.router.weight,
        "router.gate.bias": block.router.bias,
        "experts.gate": rows[:, ::2],
        "experts.up": rows[:, 1::2],
        "experts.gate_bias": bias[:, ::2],
        "experts.up_bias": bias[:, 1::2],
        "experts.down": experts.down_proj.transpose(1, 2),
        "experts.down_bias": experts.down_proj_bias,
    }


def privacy_filter(block: Any, one: float) -> Pairs:
    experts = block.experts
    rows, bias = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    return {
        **gpt_oss(block, one),
        "experts.gate": rows[:, :F],
        "experts.up": rows[:, F:],
        "experts.gate_bias": bias[:, :F],
        "experts.up_bias": bias[:, F:],
    }


def jetmoe(block: Any, one: float) -> Pairs:
    rows = block.input_linear.weight
    return {
        "router.weight": block.router.layer.weight,
        "experts.gate": rows[:, :F],
        "experts.up": rows[:, F:],
        "experts.down": block.output_linear.weight,
        "block_output.bias": block.bias,
    }


def longcat(block: Any, one: float) -> Pairs:
    rows = block.experts.gate_up_proj[:N]
    return {
        "router.weight": block.router.classifier.weight,
        "router.bias": block.router.e_score_correction_bias,
        "experts.gate": rows[:, :F],
        "experts.up": rows[:, F:],
        "experts.down": block.experts.down_proj,
    }


def nemotron(block: Any, one: float) -> Pairs:
    shared = block.shared_experts
    latent = hasattr(block.fc1_latent_proj, "weight")
    return {
        "router.weight": block.gate.weight,
        "router.bias": block.gate.e_score_correction_bias,
        "experts.up": block.experts.up_proj,
        "experts.down": block.experts.down_proj,
        "shared.up": shared.up_proj.weight,
        "shared.down": shared.down_proj.weight,
        **({"latent.down": block.fc1_latent_proj.weight, "latent.up": block.fc2_latent_proj.weight} if latent else {}),
    }


def muse_spark(block: Any, one: float) -> Pairs:
    return {
        "router.weight": block.gate.weight,
        "router.bias": block.gate.e_score_correction_bias,
        **fused(block.experts),
        "latent.down": block.pre_expert_proj.weight,
        "latent.up": block.post_expert_proj.weight,
        "latent_input.weight": one + block.pre_expert_norm.weight,
        "expert_output.weight": one + block.experts.post_expert_norm.weight,
    }


def gemma(layer: Any, one: float) -> Pairs:
    router = layer.router
    return {
        "router.gate.weight": router.proj.weight,
        "router.gate.scale": router.scale,
        "router.expert_scale": router.per_expert_scale,
        **fused(layer.experts),
        **shared_of(layer.mlp),
        "routed_input.weight": layer.pre_feedforward_layernorm_2.weight,
        "routed_output.weight": layer.post_feedforward_layernorm_2.weight,
        "shared_input.weight": layer.pre_feedforward_layernorm.weight,
        "shared_output.weight": layer.post_feedforward_layernorm_1.weight,
        "block_output.weight": layer.post_feedforward_layernorm.weight,
    }


def inkling(block: Any, one: float) -> Pairs:
    gate, shared = block.gate, block.shared_experts
    return {
        "router.weight": gate.weight[:N],
        "router.shared": gate.weight[N:],
        "router.scale": gate.global_scale,
        "router.bias": gate.e_score_correction_bias,
        **fused(block.experts),
        "shared.gate": shared.gate_proj.reshape(-1, D),
        "shared.up": shared.up_proj.reshape(-1, D),
        "shared.down": shared.down_proj.permute(1, 0, 2).reshape(D, -1),
    }


def zaya(block: Any, one: float) -> Pairs:
    gate, mlp = block.gate, block.gate.router_mlp
    return {
        "router.down": gate.down_proj.weight,
        "router.down_bias": gate.down_proj.bias,
        **({"router.scale": gate.router_states_scale} if gate.use_eda else {}),
        "router.norm": mlp.norm.weight,
        "router.first": mlp.fc1.weight,
        "router.first_bias": mlp.fc1.bias,
        "router.second": mlp.fc2.weight,
        "router.second_bias": mlp.fc2.bias,
        "router.weight": mlp.out_proj.weight,
        "router.bias": gate.balancing_biases,
        **fused(block.experts),
    }


def doge(block: Any, one: float) -> Pairs:
    return {
        "router.gate.weight": block.router_gate.weight,
        "experts.up": block.down_embed.weight.unsqueeze(1),
        "experts.down": block.up_embed.weight.unsqueeze(2),
        **shared_of(block),
    }


def hashed(block: Any, one: float) -> Pairs:
    return {**usual(block, one), "router.table": block.gate.tid2eid}


def switch(block: Any, one: float) -> Pairs:
    experts = [block.experts[f"expert_{index}"] for index in range(N)]
    return {
        "router.weight": block.router.classifier.weight,
        "experts.up": torch.stack([expert.wi.weight for expert in experts]),
        "experts.down": torch.stack([expert.wo.weight for expert in experts]),
    }


def nllb(block: Any, one: float) -> Pairs:
    experts = [block.experts[f"expert_{index}"] for index in range(N)]
    return {
        "router.weight": block.router.classifier.weight,
        "experts.up": torch.stack([expert.fc1.weight for expert in experts]),
        "experts.up_bias": torch.stack([expert.fc1.bias for expert in experts]),
        "experts.down": torch.stack([expert.fc2.weight for expert in experts]),
        "experts.down_bias": torch.stack([expert.fc2.bias for expert in experts]),
    }
