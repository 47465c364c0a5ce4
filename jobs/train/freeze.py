"""Freezing by module role, and the proof that what was frozen did not move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from jobs.models.backbones import parameter_roles
from jobs.train.optimizer import FROZEN_ROLES

if TYPE_CHECKING:
    from jobs.train.engine import Engine

Named = Iterator[tuple[str, Tensor]]


def apply_freeze(model: nn.Module, frozen: str) -> None:
    """Stop gradients of the roles that the word `frozen` names, let all others have them."""
    for _, parameter, role in parameter_roles(model):
        parameter.requires_grad_(role not in FROZEN_ROLES[frozen])
        if not parameter.requires_grad:
            parameter.grad = None


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
    roles = FROZEN_ROLES[frozen]
    if not roles:
        return ""
    names = [name for name, _, role in parameter_roles(engine.model) if role in roles]
    names += [name for name, _ in _buffers(engine.model, roles)]
    return engine.digest(names)
