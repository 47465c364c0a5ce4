"""The fields of a cell: their paths and types, and how one plain value becomes a typed one."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.uses import Names
from orchestrator.files.problems import Mistake, brief
from orchestrator.spec.cell import Cell, TrainSpec
from orchestrator.spec.rules import Rule, rules_of
from orchestrator.spec.units import Length, parse_length

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a cell: the dataclass it belongs to, its type, and its rule.

    A field of a `registry` maps names of its declarations to their parameters; `main` is the one that a bare number
    sets.
    """

    owner: type
    name: str
    hint: Any
    rule: Rule | None
    registry: Names | None = None
    main: str = ""

    @property
    def word(self) -> str:
        """What one of the names stands for ("loss")."""
        return self.registry.word if self.registry is not None else ""

    def typed(self, value: object) -> Any:
        """Return `value` with the field's type. Raises Mistake."""
        if self.owner is TrainSpec and self.name == "steps":
            value = parse_length(value)
            if isinstance(value, Length):
                return value
        value = typed(self.hint, value)
        if self.rule is not None and value is not None:
            check_all(self.rule.check, value if isinstance(value, tuple) else (value,))
        if isinstance(value, tuple) and self.name in ("suites", "at"):
            _distinct(value)
        return value


def check_all(check: Callable[[Any], Any], items: Iterable[object]) -> list[Any]:
    """Return `check` of every item. Raises one Mistake that names every wrong one."""
    results, mistakes = [], []
    for item in items:
        try:
            results.append(check(item))
        except Mistake as mistake:
            mistakes.append(mistake)
    if mistakes:
        hints = dict.fromkeys(mistake.hint for mistake in mistakes if mistake.hint)
        raise Mistake("; ".join(dict.fromkeys(mistake.message for mistake in mistakes)), "; ".join(hints))
    return results


def _distinct(values: tuple[object, ...]) -> None:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise Mistake(f"names {twice[0]!r} twice")
    if not values:
        raise Mistake("must not be empty")


@cache
def fields_of(owner: type) -> dict[str, Field]:
    """Return the fields of the dataclass `owner` that a grid may set, by name."""
    hints = typing.get_type_hints(owner)
    rules = rules_of(written(owner))
    return {
        one.name: Field(
            owner,
            one.name,
            written(hints[one.name]),
            rules.get(one.name),
            one.metadata.get("registry"),
            one.metadata.get("main", ""),
        )
        for one in dataclasses.fields(owner)
        if not one.metadata.get("derived")
    }


def written(hint: object) -> Any:
    """Return what a grid writes for a type: the open spec of a resolved model, else the type itself."""
    return getattr(hint, "WRITTEN", hint)


def dataclass_in(hint: object) -> type | None:
    """Return the dataclass that `hint` or `hint | None` names, else None."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate if candidate is hint or type(None) in typing.get_args(hint) else None
    return None


@cache
def field_paths() -> dict[Path, Field]:
    """Return every leaf field of a cell by path, without those of `execution.resources`."""
    found: dict[Path, Field] = {}

    def walk(owner: type, path: Path) -> None:
        for name, field in fields_of(owner).items():
            inner = dataclass_in(field.hint)
            if inner is not None:
                walk(inner, (*path, name))
            else:
                found[(*path, name)] = field

    walk(Cell, ())
    return found


def is_parameter(path: Path) -> bool:
    """Return whether `path` is one parameter of a kind (`finetune.optimizer_parameters.momentum`)."""
    above = field_paths().get(path[:-1])
    return above is not None and above.hint is Parameters


def type_name(hint: object) -> str:
    """Return a type hint in a person's words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args)
    if origin is tuple:
        one = type_name(args[0]).removeprefix("a ")
        many = f"lists of {one}" if typing.get_origin(args[0]) is tuple else f"{one}s"
        return f"a list of {many}" if args[-1] is Ellipsis else f"{len(args)} numbers"
    return "a mapping"


def typed(hint: Any, value: Any) -> Any:
    """Return the JSON value `value` as the scalar or tuple type `hint`; 1 passes for 1.0. Raises Mistake."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value  # its kind types it (orchestrator.spec.parameters)
    if hint is Parameters:
        if not isinstance(value, Mapping) or any(isinstance(item, Mapping) for item in value.values()):
            raise Mistake(f"must be a mapping of parameters, not {brief(value)}", "write {NAME: value}")
        return Parameters(value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return typed(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None or (args[-1] is not Ellipsis and len(items) != len(args)):
            raise Mistake(f"must be {type_name(hint)}, not {brief(value)}")
        return tuple(check_all(lambda item: typed(args[0], item), items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint and not (hint is float and not math.isfinite(value)):
        return value
    if hint is str and isinstance(value, (int, float)):
        kind = "true or false" if isinstance(value, bool) else "a number"
        raise Mistake(f"must be text, not {brief(value)}", f"put it in quotes: YAML reads it as {kind}")
    quoted = hint in (int, float) and isinstance(value, str) and value.replace(".", "", 1).isdigit()
    raise Mistake(f"must be {type_name(hint)}, not {brief(value)}", "remove the quotes" if quoted else "")
