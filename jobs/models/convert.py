"""Import of public checkpoints into our models; their way back is jobs.models.public."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model, empty_model
from jobs.models.layouts import Turn, coming, fused
from jobs.models.public import export_checkpoint
from jobs.models.sources import Checkpoint, open_checkpoint
from jobs.models.weights import canonical_state, replace_parameters
from orchestrator.errors import MoegridError
from orchestrator.spec.model import Model, Moe
from orchestrator.spec.public_config import spec_of

__all__ = ["PublicWeights", "export_checkpoint", "import_checkpoint", "load_checkpoint"]

# A Mixtral's block has a name of its own, and w1, w2, w3 for gate, down, up.
_BLOCK = r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)"
_EXPERT = re.compile(_BLOCK + r"\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_LISTED = re.compile(_BLOCK + r"\.calculator\.experts\.weight_(gate|up|down)\.(\d+)")
_FUSED = re.compile(_BLOCK + r"\.experts\.(gate_up|down)_proj")
_SHARED = re.compile(r"(model\.layers\.\d+)\.mlp\.shared_experts?\.(gate|up|down)_proj\.weight")
_SHARED_GATE = re.compile(r"(model\.layers\.\d+)\.mlp\.shared_expert_gate\.weight")
_DENSE = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(_BLOCK + r"\.gate\.(weight|e_score_correction_bias)")
_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def import_checkpoint(source: str | Path | Checkpoint) -> CausalLM:
    """Return the ModelSpec of a checkpoint, with the algorithm and shape that its config names."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    spec = spec_of(checkpoint.config)
    model = empty_model(spec, spec.vocab_size)
    own = canonical_state(model)
    weights = PublicWeights(checkpoint, own, model.spec)
    if any(tensor.is_meta for name, tensor in own.items() if name not in weights):
        model = build_model(spec, spec.vocab_size)  # router parts that it does not have are drawn
    else:
        replace_parameters(model, lambda name, old: nn.Parameter(torch.empty(old.shape)))
    load_checkpoint(model, checkpoint)
    return model


@torch.no_grad()
def load_checkpoint(model: CausalLM, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into a model of the same shape; router parts that it does not have keep their initial values.

    Raises MoegridError when a tensor has no place, another shape, or when a weight of the model is missing.
    """
    own = canonical_state(model)
    weights = PublicWeights(checkpoint, own, model.spec)
    for name in weights:
        own[name].copy_(weights[name])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a checkpoint's tensor `name` goes in one of ours: its rows, of one expert or of all (`expert` None)."""

    name: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    scale: float = 1.0
    turn: Turn | None = None
    cut: slice = field(default_factory=lambda: slice(None))
    """Which rows of the checkpoint's tensor it is."""

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor of `shape` comes in with."""
        if self.turn is None and self.cut == slice(None):
            return shape
        taken = torch.empty(shape, device="meta")[self.cut]
        return tuple((taken if self.turn is None else self.turn(taken)).shape)

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return that part of our tensor, None when it has no such expert."""
        if self.expert is None:
            return tensor
        return tensor[self.expert][self.rows] if self.expert < len(tensor) else None


class PublicWeights(Mapping[str, Tensor]):
    """A checkpoint's weights by our names, each put together when it is asked for: memory holds one at a time.

    `own` are the tensors of a model of `spec` (`canonical_state`; on the meta device is enough). Router parts that the
    checkpoint does not have are not among the names. Raises MoegridError when a tensor has no place, another shape, or
    when a weight of the model is missing.
    """

    def __init__(self, checkpoint: Checkpoint, own: Mapping[str, Tensor], spec: Model) -> None:
        self._checkpoint, self._own = checkpoint, own
        self._pieces: dict[str, list[_Piece]] = {}
        layout = str(checkpoint.config.get("model_type"))
        extra = checkpoint.config.get("num_nextn_predict_layers") or 0
        for name, shape in checkpoint.shapes.items():
            if name.startswith(tuple(f"model.layers.{spec.num_layers + layer}." for layer in range(extra))):
                continue  # what predicts tokens after the next one; transformers leaves it out, too
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tie_embeddings):
                continue
            if 0 in shape:
                continue  # of shared experts that are none
            if not spec.moe.shared_gate and _SHARED_GATE.fullmatch(name):
                if checkpoint.read(name).any():
                    raise MoegridError(
                        f"the checkpoint {checkpoint.name} cannot be imported",
                        cause=f"{name} is not zero: its shared expert is gated, ours are not",
                    )
                continue
            for target, piece in _places(name, spec.moe, layout, own):
                place = piece.of(own[target]) if target in own else None
                if place is None or place.shape != piece.turned(shape):
                    found = "" if place is None else f"; the model's is {tuple(place.shape)}"
                    raise MoegridError(
                        f"the checkpoint {checkpoint.name} does not fit the model",
                        cause=f"{name} has shape {shape}{found}",
                        hint="set the model's fields to the checkpoint's config.json",
                    )
                self._pieces.setdefault(target, []).append(piece)
        needed = {name for name in own if ".router." not in name or name.endswith("router.weight")}
        missing = sorted(name for name in needed if self._filled(name) < own[name].numel())
        if missing:
            raise MoegridError(
                f"the checkpoint {checkpoint.name} does not fit the model", cause=f"it lacks {', '.join(missing[:5])}"
            )

    def _filled(self, name: str) -> int:
        shapes = self._checkpoint.shapes
        return sum(math.prod(piece.turned(shapes[piece.name])) for piece in self._pieces.get(name, ()))

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty_like(self._own[name], device="cpu")
        for piece in self._pieces[name]:
            value, place = self._checkpoint.read(piece.name), piece.of(tensor)
            assert place is not None, "every piece has a place"
            value = value[piece.cut] if piece.turn is None else piece.turn(value[piece.cut])
            place.copy_(value * piece.scale if piece.scale != 1.0 else value)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def _places(name: str, moe: Moe, layout: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, _Piece]]:
    """Yield our names for what a checkpoint's tensor holds, each with the part of our tensor that it fills."""
    parts = fused(layout, name)
    if not parts:
        yield _place(name, moe, layout)
    first = 0
    for part in parts:
        # The last takes all that is left, so that a tensor with too many rows fits nowhere.
        end = None if part == parts[-1] or part not in own else first + len(own[part])
        yield part, _Piece(name, cut=slice(first, end))
        first = end or first


def _place(name: str, moe: Moe, layout: str) -> tuple[str, _Piece]:
    """Return our name for a checkpoint's tensor, and the part of our tensor that it fills."""
    width = moe.expert_width
    if own := coming(layout, name):
        return own[0], _Piece(name, turn=own[1])
    if match := _SHARED_GATE.fullmatch(name):
        return f"backbone.{match[1]}.mlp.block.shared_gate.weight", _Piece(name)
    parts = {"gate": slice(0, width), "up": slice(width, 2 * width), "down": slice(None)}
    if match := _EXPERT.fullmatch(name):
        layer, expert, word = match.groups()
        part = _PARTS[word]
        target = f"backbone.{layer}.mlp.block.experts.{'down' if part == 'down' else 'up'}"
        return target, _Piece(name, int(expert), parts[part])
    if match := _LISTED.fullmatch(name):  # LLaMA-MoE's lists of experts
        layer, part, expert = match.groups()
        target = f"backbone.{layer}.mlp.block.experts.{'down' if part == 'down' else 'up'}"
        return target, _Piece(name, int(expert), parts[part])
    if match := _FUSED.fullmatch(name):
        return f"backbone.{match[1]}.mlp.block.experts.{'down' if match[2] == 'down' else 'up'}", _Piece(name)
    if match := _SHARED.fullmatch(name):
        # A gate of zero halves what comes out of a shared expert.
        halved = not moe.shared_gate and name.endswith("shared_expert.down_proj.weight")
        return f"backbone.{match[1]}.mlp.block.shared.{match[2]}", _Piece(name, scale=0.5 if halved else 1.0)
    if match := _DENSE.fullmatch(name):
        return f"backbone.{match[1]}.mlp.block.ffn.{match[2]}", _Piece(name)
    if match := _ROUTER.fullmatch(name):
        part = "weight" if match[2] == "weight" else "bias"
        return f"backbone.{match[1]}.mlp.block.router.{part}", _Piece(name)
    return f"backbone.{name}", _Piece(name)
