"""How a cell names declarations that have parameters: {name: {parameter: value}}, what differs from defaults alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.registry import Registry

Values = Mapping[str, Any]  # parameters of one declaration, with the types of its dataclass
Uses = Mapping[str, Values]  # by the declaration's name
Names = Registry[Any]


class Parametrised(Protocol):
    """A declaration that a grid gives parameters: the fields of its frozen dataclass, None for none."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> type | None: ...

    @property
    def how(self) -> str:
        """How a grid uses one of ours, which is not named as those of other packages are."""
        ...
