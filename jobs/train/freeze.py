"""Freezing by rule (orchestrator.catalog.freezing), and the proof that what was frozen did not move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from orchestrator.catalog.freezing import FREEZING
from orchestrator.registry import load
from orchestrator.spec.model import ModelSpec

if TYPE_CHECKING:
    from jobs.train.engine import Engine

Named = Iterator[tuple[str, Tensor]]


def frozen_names(model: CausalLM, frozen: str) -> frozenset[str]:
    """Return the parameters that the word `frozen` ("" = none) freezes in this model."""
    if not frozen:
        return frozenset()
    rule = FREEZING.get(frozen)
    more: Callable[[str, str, ModelSpec], bool] | None = load(rule.code, FREEZING.who(frozen)) if rule.code else None
    return frozenset(
        name
        for name, _, role in parameter_roles(model)
        if role in rule.roles or (more is not None and more(name, role, model.spec))
    )


def apply_freeze(model: CausalLM, frozen: str) -> frozenset[str]:
    """Stop gradients of what the word `frozen` freezes, let all others have them; return the frozen names."""
    names = frozen_names(model, frozen)
    for name, parameter, _ in parameter_roles(model):
        parameter.requires_grad_(name not in names)
        if not parameter.requires_grad:
            parameter.grad = None
    return names


def _buffers(module: nn.Module, roles: tuple[str, ...], role: str = "other", prefix: str = "") -> Named:
    role = getattr(module, "role", role)
    if role in roles:
        saved = module.state_dict(keep_vars=True)
        yield from ((prefix + name, buffer) for name, buffer in module.named_buffers() if name in saved)
        return
    for name, child in module.named_children():
        yield from _buffers(child, roles, role, f"{prefix}{name}.")


def frozen_digest(engine: Engine, frozen: str) -> str:
    """Return the digest of what `frozen` names: parameters, balancing biases, thresholds ("" when it names nothing)."""
    if not frozen:
        return ""
    kept = frozen_names(engine.model, frozen)
    names = [name for name, _, _ in parameter_roles(engine.model) if name in kept]
    names += [name for name, _ in _buffers(engine.model, FREEZING.get(frozen).roles)]
    return engine.digest(names)
