"""What interventions change in a router: `jobs.moe.interventions` sets it, the router obeys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Switches:
    """What is on in one router; the defaults change nothing."""

    removed: tuple[int, ...] = ()  # physical experts
    temperature: float = 1.0
    random_seed: int | None = None
    drop: int = 0
