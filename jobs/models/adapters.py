"""Adapters on a model's attention and experts: what trains then, and the weights that they come to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from jobs.moe.experts import Experts, SharedExperts
from jobs.moe.lowrank import MARK, adapt
from orchestrator.errors import MoegridError
from orchestrator.spec.training import AdapterSpec


def add_adapters(model: CausalLM, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
    """Put adapters on the weights that `spec` names, in module order; return what they begin with, by name in a state.

    Nothing without a rank. MoegridError when the model has none of what the targets name.
    """
    if not spec.rank:
        return {}
    generator = torch.Generator().manual_seed(seed)
    begun: dict[str, Tensor] = {}
    for path, module, role in _modules(model, "", "other"):
        if role in spec.roles and isinstance(module, nn.Linear | Experts | SharedExperts):
            for name in ("weight",) if isinstance(module, nn.Linear) else ("gate", "up", "down"):
                if getattr(module, name, None) is not None:
                    made = adapt(module, name, spec.rank, spec.alpha, generator)
                    begun |= {f"{path}{leaf}": tensor for leaf, tensor in made.items()}
    if not begun:
        raise MoegridError(f"the model has nothing of what the adapters' targets name: {spec.targets}")
    model.adapter = spec
    return begun


def _modules(module: nn.Module, path: str, role: str) -> Iterator[tuple[str, nn.Module, str]]:
    role = getattr(module, "role", role)
    yield path, module, role
    for name, child in module.named_children():
        yield from _modules(child, f"{path}{name}.", role)


def kept_by_adapters(model: CausalLM) -> frozenset[str]:
    """Return the parameters that do not train beside adapters: all others, and the router as the adapters say."""
    adapter = model.adapter
    if adapter is None:
        return frozenset()
    router = adapter.router == "trained"
    return frozenset(
        name for name, _, role in parameter_roles(model) if MARK not in name and not (router and role == "router")
    )
