"""From a resolved spec to its router."""

from __future__ import annotations

from typing import cast

from jobs.moe.routers import Router
from jobs.moe.routers.expert_choice import ExpertChoice
from orchestrator.catalog.routers import ROUTERS
from orchestrator.registry import load
from orchestrator.spec.model import Moe


def build_router(moe: Moe, hidden_size: int) -> Router:
    """Return the router of a resolved spec: expert choice for any preset, else the code that its kind names."""
    if moe.choice == "expert":
        return ExpertChoice(moe, hidden_size)
    kind = ROUTERS.get(moe.preset)
    return cast(Router, load(kind.code, ROUTERS.who(moe.preset))(moe, hidden_size))
