"""Mixture-of-Experts blocks: routers, experts, losses and interventions behind one `Routing` record."""

from jobs.moe.block import DenseBlock, MoEBlock, build_block
from jobs.moe.routing import Routing

__all__ = ["DenseBlock", "MoEBlock", "Routing", "build_block"]
