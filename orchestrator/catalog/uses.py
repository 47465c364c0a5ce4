"""How a cell names declarations that have parameters: {name: {parameter: value}}, what differs from defaults alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.catalog.parameters import Parametrised
from orchestrator.registry import Registry

Values = Mapping[str, Any]  # parameters of one declaration, with the types of its dataclass
Uses = Mapping[str, Values]  # by the declaration's name
Names = Registry[Any]


class Used(Parametrised, Protocol):
    """A declaration that a cell names below a field of its kind, where ours are not named."""

    @property
    def code(self) -> str:
        """The dotted path of what computes it; "" where something else of its package does."""
        ...

    @property
    def how(self) -> str:
        """How a grid uses one of ours instead."""
        ...
