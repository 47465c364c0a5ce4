"""Parameters of declared kinds in a section of a cell: typed by the kind's dataclass, defaults left out."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from orchestrator.catalog.parameters import Parameters, Parametrised
from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.registry import Registry
from orchestrator.spec.fields import fields_of, typed

NOT_HERE = "remove it, or give it under with: to the values that have it"
Section = TypeVar("Section")
Wrong = tuple[tuple[str, ...], str, str]  # path in the section, message, hint


def typed_parameters(section: Section) -> tuple[Section, list[Wrong]]:
    """Return a section (a dataclass) with the parameters of its kinds typed, and what is wrong with them."""
    found: list[Wrong] = []
    changed: dict[str, object] = {}
    owner: type = type(section)
    for name, of, registry in _kinds(owner):
        given: Parameters = getattr(section, name)
        if given and (declaration := registry.find(getattr(section, of))) is not None:
            changed[name], wrong = of_kind(declaration, given, registry.word)
            found += [((name, *([parameter] if parameter else [])), *both) for parameter, *both in wrong]
    return (dataclasses.replace(section, **changed) if changed else section), found  # type: ignore[type-var]


def parameter_fields(owner: type) -> tuple[str, ...]:
    """Return the fields of a section's class that hold parameters of a kind."""
    return tuple(name for name, _, _ in _kinds(owner))


def declarations_of(owner: type) -> Iterator[tuple[str, Parametrised, Registry[Any]]]:
    """Yield (field of parameters, declaration, registry) of all kinds known so far that a section's class may name."""
    for name, _, registry in _kinds(owner):
        outside = (provided.declaration for provided in registry.outside.values())
        yield from ((name, declaration, registry) for declaration in (*outside, *registry.builtins.values()))


def of_kind(declaration: Parametrised, given: Mapping[str, object], word: str) -> tuple[Parameters, list[Any]]:
    """Return what is `given` as the kind's dataclass types it, without its defaults; and [(name, message, hint)]."""
    owner, wrong, values = declaration.parameters, [], {}
    hints = {} if owner is None else _hints(owner)
    who = f"{word} {declaration.name!r}"
    for name, value in given.items():
        if name not in hints:
            hint = did_you_mean(name, hints, "its parameters") if hints else NOT_HERE
            wrong.append((name, f"{who} has no parameter {name!r}", hint))
            continue
        try:
            values[name] = typed(hints[name], list(value) if isinstance(value, tuple) else value)
        except Mistake as mistake:
            wrong.append((name, f"{name} {mistake.message}", mistake.hint))
    if owner is None or wrong:
        return Parameters(), wrong
    try:
        filled = owner(**values)
    except ValueError as error:
        return Parameters(), [("", f"{who}: {error}", "correct its parameters")]
    default = owner()
    return Parameters({n: getattr(filled, n) for n in hints if getattr(filled, n) != getattr(default, n)}), []


def default_of(section: object, name: str, parameter: str) -> Any:
    """Return the default of a parameter of a section's field `name`, None when its kind has no such parameter."""
    owner: type = type(section)
    for field, of, registry in _kinds(owner):
        declaration = registry.find(getattr(section, of)) if field == name else None
        if declaration is not None and declaration.parameters is not None:
            return getattr(declaration.parameters(), parameter, None)
    return None


@cache
def _kinds(owner: type) -> tuple[tuple[str, str, Registry[Any]], ...]:
    """Return (field of parameters, field that names the kind, registry) of a section's class."""
    found = []
    for field in dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ():
        if of := field.metadata.get("of"):
            rule = fields_of(owner)[of].rule
            assert rule is not None
            assert rule.names is not None
            found.append((field.name, of, rule.names))
    return tuple(found)


@cache
def _hints(owner: type) -> dict[str, Any]:
    return {field.name: typing.get_type_hints(owner)[field.name] for field in dataclasses.fields(owner)}
