"""Dropout and router noise depend on (seed, phase, step, micro-batch) alone: never on what ran before."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *place: str | int) -> int:
    """Return a 63-bit seed for one place in a run."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def reseed(seed: int, *place: str | int) -> None:
    """Reset torch's generators for one place in a run."""
    torch.manual_seed(seed_of(seed, *place))
