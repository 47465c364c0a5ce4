"""Public checkpoints of vision encoders: a folder or hub repository in transformers' layout, or a pinned wheel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.data.wheels import taken_out
from jobs.models.sources import open_checkpoint
from jobs.models.vision.onnx_file import OnnxWeights
from orchestrator.catalog.encoders import ENCODERS, EncoderKind
from orchestrator.errors import MoegridError, SourceError
from orchestrator.registry import load
from orchestrator.spec.vision import EncoderSpec

# What stands before the names of an encoder inside a larger model's checkpoint.
_PREFIXES = ("", "vision_model.", "vision_tower.vision_model.", "dinov2.")
# Of a graph that torch exported the positions have no name: the class token's, and those of the patches.
_POSITIONS = "embeddings.position_embeddings"


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's tensors by their public names, each read when asked for; `fields` are those of its EncoderSpec."""

    name: str
    fields: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def encoder_weights(spec: EncoderSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of `spec.checkpoint` by the names of a dense `Encoder`.

    Raises SourceError when it is not there or is no encoder, MoegridError when its shape is another one.
    """
    found = open_encoder(ENCODERS.get(spec.encoder), spec.checkpoint)
    _check(spec, found)
    names: Mapping[str, str] = load(ENCODERS.get(spec.encoder).layout, ENCODERS.who(spec.encoder))(spec)
    prefix = next((p for p in _PREFIXES if p + names["norm.weight"] in found.shapes), None)
    if prefix is None:
        raise SourceError(
            f"{found.name} is no checkpoint of encoder {spec.encoder!r}", cause=f"it has no {names['norm.weight']}"
        )
    missing = [theirs for theirs in names.values() if prefix + theirs not in found.shapes]
    if missing:
        raise SourceError(
            f"{found.name} lacks weights of encoder {spec.encoder!r}", cause=f"there is no {', '.join(missing[:3])}"
        )
    for own, theirs in names.items():
        tensor = found.read(prefix + theirs).float()
        # DINOv2 keeps a dimension of the batch before these two.
        yield own, tensor.squeeze(0) if own == "positions" else tensor.flatten() if own == "class_token" else tensor


def open_encoder(kind: EncoderKind, source: str) -> EncoderWeights:
    """Open a folder (plain path or file://), `hub://ORG/NAME[@REVISION]`, or `wheel://NAME==VERSION/encoder`."""
    if source.startswith("wheel://"):
        return _from_graph(taken_out(source, ".onnx"))
    if Path(source.removeprefix("file://")).suffix == ".onnx":
        return _from_graph(Path(source.removeprefix("file://")))
    checkpoint = open_checkpoint(source)
    return EncoderWeights(checkpoint.name, fields_of(kind, checkpoint.config), checkpoint.shapes, checkpoint.read)


def fields_of(kind: EncoderKind, config: Mapping[str, Any]) -> Mapping[str, object]:
    """Return the fields of an EncoderSpec that a config.json says. Raises MoegridError for what we do not compute."""
    config = config.get("vision_config", config)
    model_type = str(config.get("model_type", ""))
    if model_type not in kind.model_types:
        raise MoegridError(
            f"model_type {model_type!r} is not that of encoder {kind.name!r}",
            hint=f"it reads {', '.join(kind.model_types)}; other encoders: {', '.join(ENCODERS.names())}",
        )
    if config.get("use_swiglu_ffn"):
        raise MoegridError("a DINOv2 with SwiGLU feed-forwards (ViT-g) is not read", hint="use ViT-S, B or L")
    hidden, patch = int(config["hidden_size"]), int(config["patch_size"])
    return {
        "encoder": kind.name,
        "hidden_size": hidden,
        "num_layers": int(config["num_hidden_layers"]),
        "num_heads": int(config["num_attention_heads"]),
        "width": int(config.get("intermediate_size") or hidden * config.get("mlp_ratio", 4)),
        "patch_size": patch,
        "positions": int(config["image_size"]) // patch,
        "norm_eps": float(config.get("layer_norm_eps", 1e-6)),
    }


def _check(spec: EncoderSpec, found: EncoderWeights) -> None:
    """Raise when the checkpoint's weights belong to an encoder of another shape."""
    differing = [(name, value) for name, value in found.fields.items() if getattr(spec, name) != value]
    if differing:
        raise MoegridError(
            f"the checkpoint {found.name} does not fit the vision encoder",
            cause="; ".join(f"vision.{name} is {getattr(spec, name)!r}, not {its!r}" for name, its in differing),
            hint="set these fields to the checkpoint's",
        )


def _from_graph(path: Path) -> EncoderWeights:
    """Read the DINOv2 backbone of an exported graph: what it says of its shape, and its positions put together."""
    weights, prefix = OnnxWeights(path), "backbone."
    stored = weights.shapes()
    shapes = {name.removeprefix(prefix): shape for name, shape in stored.items() if name.startswith(prefix)}
    patches = shapes.get("embeddings.patch_embeddings.projection.weight")
    if patches is None or "embeddings.cls_token" not in shapes:
        raise SourceError(
            f"{path.name} holds no DINOv2 encoder", cause=f"none of its names begins with {prefix}embeddings"
        )
    hidden = patches[0]
    parts = [
        next((name for name in weights.operands(node) if _is_positions(stored[name], hidden, node)), "")
        for node in ("Concat", "Reshape")
    ]
    if not all(parts):
        raise SourceError(f"{path.name} has no table of positions")
    side = round(stored[parts[1]][1] ** 0.5)
    layers = sum(name.endswith("layer_scale1.lambda1") for name in shapes)

    def read(name: str) -> Tensor:
        if name == _POSITIONS:
            return torch.cat([weights.read(part) for part in parts], 1)
        return weights.read(prefix + name)

    fields = {
        "encoder": "dinov2",
        "hidden_size": hidden,
        "num_layers": layers,
        "width": shapes["encoder.layer.0.mlp.fc1.bias"][0],
        "patch_size": patches[-1],
        "positions": side,
    }
    return EncoderWeights(path.stem, fields, shapes | {_POSITIONS: (1, 1 + side**2, hidden)}, read)


def _is_positions(shape: tuple[int, ...], hidden: int, node: str) -> bool:
    """Whether a stored operand is the class token's position (of a Concat), or those of the patches (of a Reshape)."""
    if len(shape) != 3 or shape[0] != 1 or shape[2] != hidden:
        return False
    return shape[1] == 1 if node == "Concat" else shape[1] > 1 and round(shape[1] ** 0.5) ** 2 == shape[1]
