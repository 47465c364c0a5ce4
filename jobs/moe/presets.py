"""From a resolved spec to its router: the one line that a new router adds."""

from __future__ import annotations

from jobs.moe.expert_choice import ExpertChoice
from jobs.moe.routers import MoEPlusPlus, Router, TCMoE, XMoE
from orchestrator.spec.model import MoESpec

# Presets without a line differ from each other in fields only and use the plain `Router`.
ROUTERS: dict[str, type[Router]] = {
    "xmoe": XMoE,
    "moepp": MoEPlusPlus,
    "tc_moe": TCMoE,
}


def build_router(moe: MoESpec, hidden_size: int) -> Router:
    """Return the router of a resolved spec: expert choice for any preset, else the preset's class."""
    cls = ExpertChoice if moe.choice == "expert" else ROUTERS.get(moe.preset, Router)
    return cls(moe, hidden_size)
