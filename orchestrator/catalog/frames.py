"""Frames: what stands around the experts of a block, each in one place of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


def _nothing(width: int) -> int:
    return 0


def _one_each(width: int) -> int:
    return width


@dataclass(frozen=True, slots=True)
class FrameKind:
    """A frame by name.

    `code` is a class "package.module:Class" of torch.nn.Module, made as (width, eps); its forward takes [..., width]
    and returns as many, row by row; `reset_parameters(std)` draws its weights. `parameter_count(width)` is how many it
    trains.
    """

    name: str
    code: str
    parameter_count: Callable[[int], int] = _nothing
    description: str = ""
    version: int = 1


NONE = "none"
_OURS = (
    FrameKind(NONE, "jobs.moe.frames:Nothing", description="nothing"),
    FrameKind("rms_norm", "jobs.moe.frames:RMSNorm", _one_each, "RMS norm, then a weight for each channel"),
    FrameKind(
        "scaled_rms_norm", "jobs.moe.frames:ScaledRMSNorm", _one_each, "a weight for each channel, then RMS norm"
    ),
    FrameKind("unit_rms_norm", "jobs.moe.frames:UnitRMSNorm", description="RMS norm without weights"),
    FrameKind("bias", "jobs.moe.frames:Bias", _one_each, "a bias for each channel"),
)
BUILTINS: Mapping[str, FrameKind] = MappingProxyType({kind.name: kind for kind in _OURS})
FRAMES = Registry("frames", "frame", FrameKind, BUILTINS)
# Where a frame may stand: field of the block -> role of its weights.
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "routed_input": "routed_expert",
        "latent_input": "routed_expert",
        "expert_output": "routed_expert",
        "routed_output": "routed_expert",
        "shared_input": "shared_expert",
        "shared_output": "shared_expert",
        "block_output": "other",
    }
)
# The width of these is that in which experts compute.
LATENT = ("latent_input", "expert_output")
