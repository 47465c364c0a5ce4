"""The parameters of a declared kind: what a grid sets of them, as plain data that is hashed and sent to nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from orchestrator.registry import Registry, load


class Parameters(Mapping[str, Any]):
    """Parameters by name, immutable: numbers, texts, truth values, null or tuples of them.

    In a resolved cell they have the types of the kind's dataclass, and those that have its defaults are left out: a
    parameter that is added with a default later changes no key.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, object] | None = None) -> None:
        self._values = {str(name): frozen(value) for name, value in (values or {}).items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Parameters):
            return self._values == other._values
        return Mapping.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"Parameters({self._values!r})"

    def replaced(self, name: str, value: object) -> Parameters:
        """Return these parameters with one of another value."""
        return Parameters({**self._values, name: value})


class Parametrised(Protocol):
    """A declaration whose kind has parameters: a frozen dataclass whose fields all have defaults, or none."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> type | None: ...


def made(declaration: Parametrised, given: Mapping[str, object]) -> Any:
    """Return the kind's own dataclass with what is `given`, None when the kind has no parameters."""
    return None if declaration.parameters is None else declaration.parameters(**given)


def asked(declaration: Parametrised, given: Mapping[str, object]) -> tuple[Any, ...]:
    """Return the last argument of a declaration's code: its parameters, () when it has none."""
    return () if declaration.parameters is None else (made(declaration, given),)


def code_of(names: Registry[Any], name: str, given: Mapping[str, object]) -> Callable[..., Any]:
    """Return the function of the declaration `name`, which gets its own parameters as the last argument."""
    kind = names.get(name)
    code, own = load(kind.code, names.who(name)), asked(kind, given)
    return (lambda *inputs: code(*inputs, *own)) if own else code


def frozen(value: object) -> Any:
    """Return a plain value with its lists as tuples, so that it can be hashed."""
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value
