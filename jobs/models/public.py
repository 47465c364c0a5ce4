"""Our models in the layouts of transformers (`jobs.models.layouts`): their config, their tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.layouts import CLASSES, DEEPSEEK, DENSE, HEADS, MIXTRALS, OLMOES, fusing, going, public_layout
from jobs.models.tensor_file import TensorFile
from jobs.models.weights import canonical_state
from jobs.moe.block import dense_width, shared_width
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.parameters import made
from orchestrator.errors import MoegridError
from orchestrator.spec.attention import SCALINGS
from orchestrator.spec.model import Model
from orchestrator.spec.public_blocks import UNGATED


@torch.no_grad()
def export_checkpoint(
    model: CausalLM,
    directory: Path,
    special: Mapping[str, int | None] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors so that transformers loads the same model.

    `special` are ids for config.json (`eos_token_id`, ...): where generation ends, and what pads. `state` are the
    weights of an empty model: one at a time is read, and written. Raises MoegridError when no public architecture
    computes what the model does.
    """
    layout, dtype = public_layout(model.spec), next(model.parameters()).dtype
    scaling = model.spec.moe.routed_scaling
    if layout not in (*DENSE, *DEEPSEEK) and dtype != torch.float32 and math.frexp(scaling)[0] != 0.5:
        raise MoegridError(
            f"routed_scaling {scaling} cannot be exported in {str(dtype).removeprefix('torch.')}",
            cause="it goes into the experts' weights, which would be rounded",
            hint="only powers of two are exact in less than fp32",
        )
    config = {
        **_config(model, layout),
        "rope_theta": model.spec.rope_theta,
        "dtype": str(dtype).removeprefix("torch."),
        **(special or {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    own = canonical_state(model)
    announced = dict(_tensors(model.spec, {name: tensor.to("meta") for name, tensor in own.items()}, layout))
    with TensorFile(directory / "model.safetensors", announced, {"format": "pt"}) as file:
        for name, tensor in _tensors(model.spec, own if state is None else state, layout):
            file.put(name, tensor.to(announced[name].dtype))


# Layouts whose projections may all have biases or none, as one field says.
_ANY_BIAS = ("llama", "olmoe", "qwen3", "qwen3_moe", "gpt_oss", "granitemoe", "flex_olmo", "glm4_moe")


def _config(model: CausalLM, layout: str) -> dict[str, Any]:
    # Imported by an export alone: a process that trains or evaluates has no use for the package.
    import transformers

    spec, moe = model.spec, model.spec.moe
    shape: dict[str, object] = {
        "vocab_size": model.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        # Beyond it, where the base grows with a sequence, transformers lets it grow.
        "max_position_embeddings": spec.rope.original_context if spec.rope.scaling == "dynamic" else spec.context,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_parameters": _rope(spec),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if layout in HEADS and not spec.latent.kv_rank:
        shape["head_dim"] = spec.head_width
    if layout in _ANY_BIAS:
        shape["attention_bias"] = bool(spec.attention_bias)
    if layout in ("mistral", "mixtral", "gpt_oss", "phi3"):
        # GPT-OSS's class makes the mask of windows even where no layer has one.
        shape["sliding_window"] = spec.attention_window or (spec.context if layout == "gpt_oss" else None)
    if layout in DENSE:
        shape["intermediate_size"] = spec.dense_width if spec.dense_layers else dense_width(moe)
    else:
        shape["num_experts_per_tok"] = moe.top_k
    if layout in (*OLMOES, *MIXTRALS):
        shape["intermediate_size"] = moe.expert_width
    if layout in MIXTRALS:
        shape["num_local_experts"] = moe.num_experts
    if layout in (*OLMOES, "qwen2_moe", "qwen3_moe"):
        shape |= {"num_experts": moe.num_experts, "norm_topk_prob": bool(moe.renormalise)}
    if layout in ("qwen2_moe", "qwen3_moe"):
        shape |= {
            "intermediate_size": spec.dense_width or moe.expert_width,
            "moe_intermediate_size": moe.expert_width,
            "mlp_only_layers": list(range(spec.dense_layers)),
            "decoder_sparse_step": 1,
        }
    if layout == "qwen2_moe":
        shape |= {
            "shared_expert_intermediate_size": shared_width(moe) * moe.shared_experts,
            "qkv_bias": bool(spec.attention_bias),
            UNGATED: not moe.shared_gate,
        }
    if layout in _OWN:
        shape |= _OWN[layout](spec)
    name = CLASSES[layout]
    config: dict[str, Any] = getattr(transformers, f"{name}Config")(**shape).to_dict()
    return {**config, "architectures": [f"{name}ForCausalLM"]}


def _rope(spec: Model) -> dict[str, object]:
    """Return the field of config.json that says how positions turn."""
    rope = spec.rope
    fields: dict[str, object] = {"rope_type": rope.scaling or "default", "rope_theta": spec.rope_theta}
    if rope.fraction != 1.0:
        fields["partial_rotary_factor"] = rope.fraction
    # Zeros stand for what a config.json leaves out.
    said = {name: getattr(rope, name) for name in SCALINGS[rope.scaling]}
    fields |= {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in said.items()
        if value or isinstance(value, bool)
    }
    if "original_context" in fields:
        fields["original_max_position_embeddings"] = fields.pop("original_context")
    return fields


def _granite(spec: Model) -> dict[str, object]:
    scales = spec.multipliers
    return {
        "embedding_multiplier": scales.embedding,
        "attention_multiplier": scales.attention or spec.head_width**-0.5,
        "residual_multiplier": scales.residual,
        "logits_scaling": scales.logits,
    }


def _gpt_oss(spec: Model) -> dict[str, object]:
    own = made(EXPERTS.get(spec.moe.expert), spec.moe.expert_parameters)
    kinds = ("full_attention", "sliding_attention")
    layers = [kinds[spec.windowed(layer)] for layer in range(spec.num_layers)]
    return {"swiglu_limit": own.limit, "swiglu_alpha": own.alpha, "layer_types": layers}


def _deepseek(spec: Model) -> dict[str, object]:
    moe = spec.moe
    return {
        "intermediate_size": spec.dense_width or moe.expert_width,
        "moe_intermediate_size": moe.expert_width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_experts,
        "first_k_dense_replace": spec.dense_layers,
        "routed_scaling_factor": moe.routed_scaling,
        "norm_topk_prob": moe.renormalise,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
    }


def _latent(spec: Model) -> dict[str, object]:
    latent = spec.latent
    return {
        **_deepseek(spec),
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank or None,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "num_nextn_predict_layers": 0,
    }


_OWN: Mapping[str, Callable[[Model], dict[str, object]]] = {
    "granitemoe": _granite,
    # Its class has a context of its own there, which counts before that of the positions.
    "phi3": lambda spec: {"original_max_position_embeddings": spec.rope.original_context or spec.context},
    "gpt_oss": _gpt_oss,
    "glm4_moe": lambda spec: {
        **_deepseek(spec),
        "use_qk_norm": bool(spec.normed),
        "partial_rotary_factor": spec.rope.fraction,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3": lambda spec: {**_latent(spec), "rope_interleave": spec.rope.interleaved},
    "deepseek_v2": lambda spec: {
        **_latent(spec),
        "topk_method": "group_limited_greedy" if spec.moe.n_group > 1 else "greedy",
    },
}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def _tensors(spec: Model, state: Mapping[str, Tensor], layout: str) -> Iterator[tuple[str, Tensor]]:
    moe, scaling = spec.moe, 1.0 if layout in DEEPSEEK else spec.moe.routed_scaling
    block = "block_sparse_moe" if layout == "mixtral" else "mlp"
    shared_name = "shared_experts" if layout in DEEPSEEK else "shared_expert"
    for name, tensor in state.items():
        if held := fusing(layout, name):
            public, parts = held
            if name == parts[0]:
                yield public, torch.cat([state[part] for part in parts])
            continue
        if own := list(going(layout, name, tensor * scaling if name.endswith("experts.down") else tensor)):
            yield from own
            continue
        public = name.removeprefix("backbone.")
        layer, _, part = public.partition(".mlp.block.")
        if not part:
            yield public, tensor
        elif part == "router.weight":
            yield f"{layer}.{block}.gate.weight", tensor
            if layout == "qwen2_moe" and not moe.shared_gate:
                yield f"{layer}.mlp.shared_expert_gate.weight", tensor.new_zeros(1, tensor.shape[1])
        elif part == "router.bias":
            yield f"{layer}.{block}.gate.e_score_correction_bias", tensor
        elif part.startswith("experts."):
            whole = tensor * scaling if part == "experts.down" else tensor
            for expert, matrix in enumerate(whole):
                pieces = {"down": matrix}
                if part != "experts.down":
                    pieces = {"gate": matrix[: moe.expert_width], "up": matrix[moe.expert_width :]}
                for piece, values in pieces.items():
                    word = _MIXTRAL[piece] if layout == "mixtral" else f"{piece}_proj"
                    yield f"{layer}.{block}.experts.{expert}.{word}.weight", values
        elif part == "shared_gate.weight":
            yield f"{layer}.mlp.shared_expert_gate.weight", tensor
        else:
            shared = part.startswith("shared.")
            piece = part.rpartition(".")[2]
            halved = shared and layout == "qwen2_moe" and piece == "down" and not moe.shared_gate
            values = 2 * tensor if halved else tensor
            yield f"{layer}.{f'mlp.{shared_name}' if shared else 'mlp'}.{piece}_proj.weight", values
