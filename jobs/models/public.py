"""Our models in the layouts of transformers: the architecture there that computes the same, its config, its tensors.

| ours | architecture |
|---|---|
| backbone olmoe, softmax top-k | OlmoeForCausalLM |
| preset dense with swiglu, another backbone | LlamaForCausalLM |
| softmax top-k with shared experts, another backbone (DeepSeekMoE 16B) | Qwen2MoeForCausalLM |
| renormalised softmax top-k without shared experts, another backbone (an upcycled dense model) | MixtralForCausalLM |
| softmax top-k without shared experts, queries and keys normed in each head (`qk_norm: head`) | Qwen3MoeForCausalLM |
| preset dense, `qk_norm: head`, or biases of queries, keys and values | Qwen3ForCausalLM, Qwen2ForCausalLM |

transformers has no class for DeepSeekMoE 16B: `deepseek_v2` and `deepseek_v3` have another attention. Qwen2-MoE without
biases is the same model but for a gate, sigmoid(w x), on its shared expert: w = 0 halves it, which twice the weights of
its last matrix undo, exactly. A factor on the routed experts goes into their last matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.tensor_file import TensorFile
from jobs.models.weights import canonical_state
from jobs.moe.block import dense_width
from orchestrator.catalog.routers import kind_of
from orchestrator.errors import MoegridError
from orchestrator.spec.model import DEFAULTS, PARTS, Model, MoESpec
from orchestrator.spec.public_config import UNGATED

# What our block may do that no layout holds; other fields change nothing unless one of these does.
_OURS = (
    "score",
    "choice",
    "unit",
    "n_group",
    "balance_bias",
    "collaboration_top",
    "zero_experts",
    "copy_experts",
    "constant_experts",
    "null_experts",
    "gating_residual",
    "gating_layers",
    "temperature",
    "combine",
    "expert",
)
# Layouts that have projections with biases (without any, unless one is said here), and those with heads of any width.
_BIASES = {"llama": ("", "all"), "qwen2": ("qkv",), "qwen2_moe": ("", "qkv")}
_HEADS = ("llama", "qwen3", "qwen3_moe", "mixtral")
_DENSE = ("llama", "qwen2", "qwen3")
EXPORTED = (
    "softmax top-k of swiglu experts is exported: on backbone olmoe without shared experts, on the others with shared"
    " experts (sum), or renormalised without; and dense models (swiglu) but on backbone olmoe"
)


def public_layout(spec: Model) -> str:
    """Return the `model_type` of the architecture of transformers that computes what `spec` does.

    Raises MoegridError that names what none of them has.
    """
    moe, llama = spec.moe, spec.normed != "full"
    own = [f"{name} {getattr(moe, name)!r}" for name in _OURS if getattr(moe, name) != DEFAULTS[name]]
    kind = kind_of(moe)
    own += [
        f"{name} {getattr(moe, name)!r}"
        for name in (*PARTS, "shared_expert")
        if getattr(moe, name) != getattr(MoESpec(), name)
    ]
    if kind.routes and not kind.plain:
        own.append(f"the router of preset {moe.preset!r}")
    if not kind.routes:
        if not llama:
            own.append("dense layers with the attention of OLMoE")
        if len({dense_width(moe), *([spec.dense_width] if spec.dense_layers else [])}) > 1:
            own.append(f"dense layers of two widths ({spec.dense_width} and {dense_width(moe)})")
        layout = "qwen3" if spec.normed else "qwen2" if spec.attention_bias == "qkv" else "llama"
    elif not llama:
        own += [f"{name} {getattr(moe, name)!r}" for name in ("shared_experts",) if moe.shared_experts]
        own += [f"dense_layers {spec.dense_layers}"] if spec.dense_layers else []
        own += [f"routed_scaling {moe.routed_scaling}"] if moe.routed_scaling != 1 else []
        layout = "olmoe"
    elif moe.shared_experts:
        own += ["normed heads beside shared experts"] if spec.normed else []
        layout = "qwen2_moe"
    elif spec.normed:
        layout = "qwen3_moe"
    else:
        own += [] if moe.renormalise else ["renormalise False without shared experts"]
        own += [f"dense_layers {spec.dense_layers} without shared experts"] if spec.dense_layers else []
        layout = "mixtral"
    if spec.attention_bias not in _BIASES.get(layout, ("",)):
        own.append(f"attention_bias {spec.attention_bias!r}")
    if spec.head_width * spec.num_heads != spec.hidden_size and layout not in _HEADS:
        own.append(f"head_dim {spec.head_dim}")
    if own:
        raise MoegridError(
            f"preset {moe.preset!r} on backbone {spec.backbone!r} has no public layout",
            cause=f"no architecture of transformers has {', '.join(own)}",
            hint=EXPORTED,
        )
    return layout


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
    if layout not in _DENSE and dtype != torch.float32 and math.frexp(scaling)[0] != 0.5:
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
        "max_position_embeddings": spec.context,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if layout in _HEADS:
        shape["head_dim"] = spec.head_width
    if layout in _DENSE:
        shape["intermediate_size"] = spec.dense_width if spec.dense_layers else dense_width(moe)
        if layout == "llama":
            shape["attention_bias"] = bool(spec.attention_bias)
    else:
        shape["num_experts_per_tok"] = moe.top_k
    if layout in ("olmoe", "mixtral"):
        shape["intermediate_size"] = moe.expert_width
    if layout == "mixtral":
        shape["num_local_experts"] = moe.num_experts
    if layout in ("olmoe", "qwen2_moe", "qwen3_moe"):
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
            "shared_expert_intermediate_size": moe.expert_width * moe.shared_experts,
            "qkv_bias": bool(spec.attention_bias),
            UNGATED: not moe.shared_gate,
        }
    name = _CLASSES[layout]
    config: dict[str, Any] = getattr(transformers, f"{name}Config")(**shape).to_dict()
    return {**config, "architectures": [f"{name}ForCausalLM"]}


_CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def _tensors(spec: Model, state: Mapping[str, Tensor], layout: str) -> Iterator[tuple[str, Tensor]]:
    moe, scaling = spec.moe, spec.moe.routed_scaling
    block = "block_sparse_moe" if layout == "mixtral" else "mlp"
    for name, tensor in state.items():
        public = name.removeprefix("backbone.")
        layer, _, part = public.partition(".mlp.block.")
        if not part:
            yield public, tensor
        elif part == "router.weight":
            yield f"{layer}.{block}.gate.weight", tensor
            if layout == "qwen2_moe" and not moe.shared_gate:
                yield f"{layer}.mlp.shared_expert_gate.weight", tensor.new_zeros(1, tensor.shape[1])
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
            values = 2 * tensor if shared and piece == "down" and not moe.shared_gate else tensor
            yield f"{layer}.{'mlp.shared_expert' if shared else 'mlp'}.{piece}_proj.weight", values
