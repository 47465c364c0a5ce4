"""Routers: from a token's hidden state to a `Routing` record; `orchestrator.catalog.routers` declares them."""

from jobs.moe.routers.base import Context, Part, Router, chosen_scores, renormalised
from jobs.moe.routers.moepp import MoEPlusPlus
from jobs.moe.routers.tc_moe import TCMoE
from jobs.moe.routers.xmoe import XMoE

__all__ = ["Context", "MoEPlusPlus", "Part", "Router", "TCMoE", "XMoE", "chosen_scores", "renormalised"]
