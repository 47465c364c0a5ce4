"""The blocks of the model that a public checkpoint's config.json describes, by layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import DEEPSEEK, DENSE, OLMOE
from orchestrator.errors import SourceError
from orchestrator.spec.model import MoESpec

Fields = Mapping[str, Any]  # of a config.json
# Of a Qwen2-MoE that stands for a model without a gate: it holds zeros, which halve what twice the weights double.
UNGATED = "moegrid_ungated"


class Config:
    """The fields of a config.json, typed."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def number(self, name: str, other: str = "") -> int:
        """Return a whole number; SourceError when it is none, and `other` is not there either."""
        value = self.fields.get(name, self.fields.get(other))
        if not isinstance(value, int) or isinstance(value, bool):
            kind = self.fields.get("model_type")
            raise SourceError(
                f"a checkpoint of type {kind!r} cannot be imported", cause=f"its config.json has {name} {value!r}"
            )
        return value

    def flag(self, name: str) -> bool:
        return bool(self.fields.get(name, False))

    def leading_dense(self) -> int:
        """Return how many layers are dense, which must be the first ones. Raises SourceError."""
        layers = self.fields.get("mlp_only_layers") or []
        if layers != list(range(len(layers))):
            kind = self.fields.get("model_type")
            raise SourceError(f"a checkpoint of type {kind!r} cannot be imported", cause=f"mlp_only_layers {layers}")
        return len(layers)


def dense(config: Config) -> MoESpec:
    return MoESpec(preset=DENSE, top_k=1, num_experts=1, expert_width=config.number("intermediate_size"))


def olmoe(config: Config) -> MoESpec:
    return MoESpec(
        preset=OLMOE,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts"),
        expert_width=config.number("intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
    )


def mixtral(config: Config) -> MoESpec:
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_local_experts", "num_experts"),
        expert_width=config.number("intermediate_size"),
    )


def llama_moe(config: Config) -> MoESpec:
    experts, width = config.number("num_experts"), config.number("intermediate_size")
    each, rest = divmod(width, experts)
    # Of every expert, or for each layer of every expert.
    given = config.fields.get("size_experts") or []
    sizes = {size for row in given for size in (row if isinstance(row, list) else (row,))}
    if rest or sizes - {each}:
        found = f"experts of the widths {sorted(sizes)}" if sizes else f"{experts} experts of together {width}"
        raise SourceError("a checkpoint of type 'llama_moe' cannot be imported", cause=f"it has {found}")
    noise = {"noise": bool(config.fields.get("gate_add_noise", True))}
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_selects"),
        num_experts=experts,
        expert_width=each,
        routed_scaling=float(config.fields.get("score_scale_factor") or 1.0),
        gate="tanh_mlp",
        gate_parameters=Parameters({**noise, "least": float(config.fields.get("gate_noise_epsilon", 0.01))}),
    )


def qwen3_moe(config: Config) -> MoESpec:
    return MoESpec(
        preset=OLMOE,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts", "num_local_experts"),
        expert_width=config.number("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
    )


def qwen2_moe(config: Config) -> MoESpec:
    width, shared = config.number("moe_intermediate_size"), config.number("shared_expert_intermediate_size")
    whole = shared % width == 0
    return MoESpec(
        preset=DEEPSEEK,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts", "num_local_experts"),
        shared_experts=shared // width if whole else 1,
        shared_width=0 if whole else shared,
        expert_width=width,
        renormalise=config.flag("norm_topk_prob"),
        # What we write without a gate says so; anything else has one.
        shared_gate=not config.flag(UNGATED),
    )


def deepseek(config: Config) -> MoESpec:
    return MoESpec(
        preset=DEEPSEEK,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("n_routed_experts"),
        shared_experts=config.fields.get("n_shared_experts") or 0,
        expert_width=config.number("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
        routed_scaling=float(config.fields.get("routed_scaling_factor") or 1.0),
    )


def gpt_oss(config: Config) -> MoESpec:
    own = {"limit": config.fields.get("swiglu_limit", 7.0), "alpha": config.fields.get("swiglu_alpha", 1.702)}
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_local_experts", "num_experts"),
        expert_width=config.number("intermediate_size"),
        gate="affine",
        expert="swiglu_shifted_bias",
        expert_parameters=Parameters({name: float(value) for name, value in own.items()}),
    )


def deepseek_v2(config: Config) -> MoESpec:
    limited = config.fields.get("topk_method") == "group_limited_greedy"
    return replace(grouped(config) if limited else deepseek(config), variant="v2")


def deepseek_v3(config: Config) -> MoESpec:
    return replace(grouped(config), variant="v3")


def grouped(config: Config) -> MoESpec:
    return replace(deepseek(config), n_group=config.number("n_group"), topk_group=config.number("topk_group"))
