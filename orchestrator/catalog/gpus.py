"""Accelerators by name, and what else a time is reckoned from: published peaks, and what is assumed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError, did_you_mean

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator by its maker's data sheet: dense FLOP/s, bytes/s of memory, bytes/s to others of its node."""

    name: str
    memory: int
    half: float  # FLOP/s of bf16 products
    single: float  # FLOP/s of fp32 products, without TF32
    bandwidth: float
    link: float  # each way


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("a100-40gb", 40 * GIB, 312e12, 19.5e12, 1.555e12, 300e9),
            Gpu("a100", 80 * GIB, 312e12, 19.5e12, 2.039e12, 300e9),
            Gpu("h100", 80 * GIB, 989e12, 67e12, 3.35e12, 450e9),
            Gpu("h200", 141_000_000_000, 989e12, 67e12, 4.8e12, 450e9),
            Gpu("b200", 180_000_000_000, 2250e12, 75e12, 7.7e12, 900e9),
        )
    }
)
DEFAULT = "h100"


def gpu_of(name: str) -> Gpu:
    """Return an accelerator by its name; MoegridError naming those that are known."""
    if name not in GPUS:
        raise MoegridError(f"GPU {name!r} is not known", hint=did_you_mean(name, GPUS, "GPUs"))
    return GPUS[name]


def bytes_sent(collective: str, size: int, ranks: int, backend: str = "nccl") -> float:
    """Return the bytes that each rank sends in a ring for a collective whose whole buffer has `size` bytes.

    Gloo has no reduce-scatter of its own: torch reduces the whole buffer on every rank.
    """
    if ranks < 2:
        return 0.0
    share = (ranks - 1) / ranks
    if collective.startswith("allreduce") or (backend == "gloo" and collective.startswith("reduce_scatter")):
        return 2 * share * size
    return share * size
