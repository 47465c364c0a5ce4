"""The role of every parameter: what freeze schedules and learning rates name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def parameter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (name, parameter, role): the role of the nearest enclosing module that has one, else `other`."""
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str, role: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        role = getattr(module, "role", role)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter, role
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.", role)

    yield from walk(model, "", "other")
