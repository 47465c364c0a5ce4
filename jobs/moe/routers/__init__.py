"""Routers: from a token's hidden state to a `Routing` record; `orchestrator.catalog.routers` declares them."""

from jobs.moe.routers.base import Context, Part, Router
from jobs.moe.routers.moepp import MoEPlusPlus
from jobs.moe.routers.tc_moe import TCMoE
from jobs.moe.routers.xmoe import XMoE
from jobs.moe.weighing import chosen_scores, renormalised

__all__ = ["Context", "MoEPlusPlus", "Part", "Router", "TCMoE", "XMoE", "chosen_scores", "renormalised"]
