"""Import of public checkpoints into our models; their way back is jobs.models.public."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.public import export_checkpoint
from jobs.models.sources import Checkpoint, open_checkpoint
from jobs.models.weights import canonical_state
from orchestrator.errors import MoegridError
from orchestrator.spec.public_config import spec_of

__all__ = ["export_checkpoint", "import_checkpoint", "load_checkpoint"]

_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj")
_SHARED = re.compile(r"(model\.layers\.\d+)\.mlp\.shared_experts?\.(gate|up|down)_proj\.weight")
_SHARED_GATE = re.compile(r"model\.layers\.\d+\.mlp\.shared_expert_gate\.weight")
_DENSE = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.(weight|e_score_correction_bias)")


def import_checkpoint(source: str | Path | Checkpoint) -> CausalLM:
    """Return the ModelSpec of a checkpoint, with the algorithm and shape that its config names."""
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
        if _SHARED_GATE.fullmatch(name):
            if tensor.any():
                raise MoegridError(
                    f"the checkpoint {checkpoint.name} cannot be imported",
                    cause=f"{name} is not zero: its shared expert is gated, ours are not",
                )
            continue
        target, place = _place(own, name, model.spec.moe.expert_width)
        if target not in own or place is None or place.shape != tensor.shape:
            found = "" if place is None else f"; the model's is {tuple(place.shape)}"
            raise MoegridError(
                f"the checkpoint {checkpoint.name} does not fit the model",
                cause=f"{name} has shape {tuple(tensor.shape)}{found}",
                hint="set the model's fields to the checkpoint's config.json",
            )
        # A gate of zero halves what comes out of a shared expert.
        place.copy_(tensor / 2 if name.endswith("shared_expert.down_proj.weight") else tensor)
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
