"""Import of public checkpoints into our models, and export back to the layout that transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.models.backbones import CausalLM, build_model, canonical_state
from jobs.models.shards import write_tensors
from jobs.models.sources import Checkpoint, open_checkpoint
from jobs.moe.block import dense_width
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.model import ModelSpec, MoESpec

_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj")
_SHARED = re.compile(r"(model\.layers\.\d+)\.mlp\.shared_experts\.(gate|up|down)_proj\.weight")
_DENSE = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.(weight|e_score_correction_bias)")


# Fields of config.json that change what is computed, with the values that our models compute.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
}
_SUPPORTED_DEEPSEEK: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy", "gready"),  # as the public config of 16B spells it
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
}
_NORM_EPS = {"olmoe": 1e-5, "deepseek": 1e-6, "llama": 1e-6}  # where config.json leaves it to its class


def spec_of(config: dict[str, Any]) -> ModelSpec:
    """Return the ModelSpec of a transformers config (olmoe, deepseek 16B, llama); SourceError for other types."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    supported = {**_SUPPORTED, **(_SUPPORTED_DEEPSEEK if kind == "deepseek" else {})}
    unsupported = [f"{name} {config[name]!r}" for name, known in supported.items() if config.get(name) not in known]
    for scaling in (config.get("rope_scaling") or {}, rope):
        if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
            unsupported.append(f"rope scaling {scaling}")
    if kind not in ("olmoe", "deepseek", "llama") or unsupported:
        raise SourceError(
            f"a checkpoint of type {kind!r} cannot be imported",
            cause="; ".join(unsupported) or "known types are olmoe, deepseek (16B layout) and llama",
        )

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise SourceError(
                f"a checkpoint of type {kind!r} cannot be imported", cause=f"its config.json has {name} {value!r}"
            )
        return value

    shape: dict[str, Any] = {
        "hidden_size": number("hidden_size"),
        "num_layers": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads") or number("num_attention_heads"),
        "context": number("max_position_embeddings"),
        "vocab_size": number("vocab_size"),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "norm_eps": float(config.get("rms_norm_eps", _NORM_EPS[kind])),
        "init_std": float(config.get("initializer_range") or 0.02),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if kind == "llama":
        moe = MoESpec(preset="dense", top_k=1, num_experts=1, expert_width=number("intermediate_size"))
        return ModelSpec(backbone="smollm2", moe=moe, **shape)
    if kind == "olmoe":
        moe = MoESpec(
            preset="olmoe",
            top_k=number("num_experts_per_tok"),
            num_experts=number("num_experts"),
            expert_width=number("intermediate_size"),
            renormalise=bool(config.get("norm_topk_prob", False)),
        )
        return ModelSpec(backbone="olmoe", moe=moe, **shape)
    moe = MoESpec(
        preset="deepseek_moe",
        top_k=number("num_experts_per_tok"),
        num_experts=number("n_routed_experts"),
        shared_experts=config.get("n_shared_experts") or 0,
        expert_width=number("moe_intermediate_size"),
        renormalise=bool(config.get("norm_topk_prob", False)),
        routed_scaling=float(config.get("routed_scaling_factor") or 1.0),
    )
    dense = config.get("first_k_dense_replace", 0)
    return ModelSpec(
        backbone="deepseek_moe", dense_layers=dense, dense_width=number("intermediate_size"), moe=moe, **shape
    )


def import_checkpoint(source: str | Path | Checkpoint) -> CausalLM:
    """Return the model of a checkpoint, with the algorithm and shape that its config names."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    spec = spec_of(checkpoint.config)
    model = build_model(spec, spec.vocab_size)
    load_checkpoint(model, checkpoint)
    return model


@torch.no_grad()
def load_checkpoint(model: CausalLM, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into a model of the same shape; router parts that it does not have keep their initial values.

    Raises MoegridError when a tensor has no place, another shape, or when a weight of the model is missing.
    """
    own = canonical_state(model)
    missing = {name for name in own if ".router." not in name or name.endswith("router.weight")}
    for name, tensor in checkpoint.tensors():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.spec.tie_embeddings):
            continue
        target, place = _place(own, name, model.spec.moe.expert_width)
        if target not in own or place is None or place.shape != tensor.shape:
            found = "" if place is None else f"; the model's is {tuple(place.shape)}"
            raise MoegridError(
                f"the checkpoint {checkpoint.name} does not fit the model",
                cause=f"{name} has shape {tuple(tensor.shape)}{found}",
                hint="set the model's fields to the checkpoint's config.json",
            )
        place.copy_(tensor)
        missing.discard(target)
    if missing:
        raise MoegridError(
            f"the checkpoint {checkpoint.name} does not fit the model",
            cause=f"it lacks {', '.join(sorted(missing)[:5])}",
        )


def _place(own: dict[str, Tensor], name: str, width: int) -> tuple[str, Tensor | None]:
    """Return our name for a checkpoint's tensor and the (part of the) tensor that it fills."""
    if match := _EXPERT.fullmatch(name):
        layer, expert, part = match.groups()
        target = f"backbone.{layer}.mlp.block.experts.{'down' if part == 'down' else 'up'}"
        tensor = own.get(target)
        if tensor is None or int(expert) >= len(tensor):
            return target, None
        whole = tensor[int(expert)]
        return target, whole if part == "down" else whole[:width] if part == "gate" else whole[width:]
    if match := _FUSED.fullmatch(name):
        target = f"backbone.{match[1]}.mlp.block.experts.{'down' if match[2] == 'down' else 'up'}"
    elif match := _SHARED.fullmatch(name):
        target = f"backbone.{match[1]}.mlp.block.shared.{match[2]}"
    elif match := _DENSE.fullmatch(name):
        target = f"backbone.{match[1]}.mlp.block.ffn.{match[2]}"
    elif match := _ROUTER.fullmatch(name):
        target = f"backbone.{match[1]}.mlp.block.router.{'weight' if match[2] == 'weight' else 'bias'}"
    else:
        target = f"backbone.{name}"
    return target, own.get(target)


def export_checkpoint(model: CausalLM, directory: Path, special: Mapping[str, int | None] | None = None) -> None:
    """Write config.json and model.safetensors so that transformers loads the same model.

    `special` are ids for config.json (`eos_token_id`, ...): where generation ends, and what pads. Raises MoegridError
    when no public architecture computes what the model does.
    """
    config = {**_public_config(model), **(special or {})}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.contiguous().clone() for name, tensor in _public_tensors(model)}
    write_tensors(tensors, directory / "model.safetensors", {"format": "pt"})


def _public_config(model: CausalLM) -> dict[str, Any]:
    spec, moe = model.spec, model.spec.moe
    plain = moe.score == "softmax" and moe.choice == "token" and moe.unit == "token" and moe.expert == "swiglu"
    plain = plain and moe.n_group == 1 and not moe.collaboration_top and not moe.balance_bias
    plain = plain and moe.preset not in ("dense", "moepp", "tc_moe") and moe.temperature == 1.0
    config: dict[str, Any] = model.config.to_dict()
    config["rope_theta"], config["dtype"] = spec.rope_theta, str(next(model.parameters()).dtype).removeprefix("torch.")
    widths = {dense_width(moe), *([spec.dense_width] if spec.dense_layers else [])}
    if moe.preset == "dense" and spec.backbone != "olmoe" and moe.expert == "swiglu" and len(widths) == 1:
        return {**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if (
        plain
        and spec.backbone == "olmoe"
        and not moe.shared_experts
        and not spec.dense_layers
        and moe.routed_scaling == 1
    ):
        return {**config, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}
    if plain and spec.backbone == "deepseek_moe" and moe.combine == "sum" and moe.shared_experts:
        return {
            **config,
            "architectures": ["DeepseekForCausalLM"],
            "model_type": "deepseek",
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.shared_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_width,
            "first_k_dense_replace": spec.dense_layers,
            "moe_layer_freq": 1,
            "norm_topk_prob": moe.renormalise,
            "routed_scaling_factor": moe.routed_scaling,
            "scoring_func": "softmax",
        }
    raise MoegridError(
        f"preset {moe.preset!r} on backbone {spec.backbone!r} has no public layout",
        cause="no architecture of transformers computes the same",
        hint="olmoe without shared experts, deepseek_moe, and dense Llama models (swiglu) can be exported",
    )


def _public_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    width = model.spec.moe.expert_width
    for name, tensor in canonical_state(model).items():
        public = name.removeprefix("backbone.")
        layer, _, part = public.partition(".mlp.block.")
        if not part:
            yield public, tensor
        elif part == "router.weight":
            yield f"{layer}.mlp.gate.weight", tensor
        elif part.startswith("experts."):
            for expert, matrix in enumerate(tensor):
                stem = f"{layer}.mlp.experts.{expert}"
                if part == "experts.down":
                    yield f"{stem}.down_proj.weight", matrix
                else:
                    yield f"{stem}.gate_proj.weight", matrix[:width]
                    yield f"{stem}.up_proj.weight", matrix[width:]
        else:
            group = "mlp.shared_experts" if part.startswith("shared.") else "mlp"
            yield f"{layer}.{group}.{part.rpartition('.')[2]}_proj.weight", tensor
