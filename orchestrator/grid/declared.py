"""Fields that name declarations of a registry: `losses: {my_loss: {coef: 0.01, margin: 2}}`.

What is written below a name is typed by the declaration's own parameters. A value holds what differs from their
defaults alone, so that a parameter that is added later changes no key.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from orchestrator.catalog.uses import Used, Uses, Values
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake, brief
from orchestrator.spec.fields import Field, Path, field_paths, is_parameter
from orchestrator.spec.rules import NOT_NEGATIVE

Report = Callable[[Path, str, str], None]  # path, message, hint


def kind_of(field: Field, name: str) -> Used:
    """Return the declaration called `name` that `field` may hold. Raises Mistake."""
    registry = field.registry
    assert registry is not None
    try:
        kind: Used | None = registry.find(name)
    except MoegridError as error:
        raise Mistake("; ".join(filter(None, (error.error, error.cause))), error.hint) from None
    if kind is None:
        raise Mistake(f"{registry.word} {name!r} is unknown", registry.hint(name))
    if name in registry.builtins:
        raise Mistake(f"{registry.word} {name!r} is moegrid's own", kind.how)
    if not kind.code:
        raise Mistake(f"{registry.word} {name!r} has no code of its own", "a suite of its package makes it")
    return kind


def parameters_of(field: Field, kind: Used) -> dict[str, Field]:
    """Return what may be written below the name of `kind` in `field`."""
    main = {field.main: Field(type(kind), field.main, float, NOT_NEGATIVE)} if field.main else {}
    return main | (_fields(kind.parameters) if kind.parameters is not None else {})


@cache
def _fields(owner: type) -> dict[str, Field]:
    hints = typing.get_type_hints(owner)
    return {one.name: Field(owner, one.name, hints[one.name], None) for one in dataclasses.fields(owner)}


def opened(path: Path) -> tuple[Field, str, Path] | None:
    """Return the field that names declarations, the name and what follows it, where `path` leads into such a field."""
    for stop in range(len(path) - 1, 0, -1):
        field = field_paths().get(path[:stop])
        if field is not None:
            return (field, path[stop], path[stop + 1 :]) if field.registry is not None else None
    return None


def field_at(path: Path) -> Field:
    """Return the field at `path`, also below a declaration's name. Raises Mistake."""
    if path in field_paths():
        return field_paths()[path]
    if is_parameter(path):
        return Field(field_paths()[path[:-1]].owner, path[-1], Any, None)  # typed with its kind
    found = opened(path)
    if found is None:
        raise Mistake(f"{'.'.join(path)!r} is not a field of a cell")
    field, name, rest = found
    known = parameters_of(field, kind_of(field, name))
    word = ".".join(rest) or field.main
    if word not in known:
        raise Mistake(f"{field.word} {name!r} has no parameter {word!r}", _near(word, known))
    return known[word]


def read_uses(field: Field, value: object, path: Path, report: Report) -> Uses | None:
    """Return what is written at `path`, typed; None when something was wrong with it. Raises Mistake."""
    if isinstance(value, list) and not field.main:
        if twice := [name for i, name in enumerate(value) if name in value[:i]]:
            raise Mistake(f"names {twice[0]!r} twice")
        value = dict.fromkeys(value) if all(isinstance(name, str) for name in value) else value
    if not isinstance(value, Mapping):
        example = f"{{NAME: {{{field.main}: 0.01}}}}" if field.main else "[NAME]"
        raise Mistake(f"must be a mapping of {path[-1]}, not {brief(value)}", f"as in {example}")
    found: dict[str, Values] = {}
    sound = True
    for name, given in value.items():
        if given is False:
            continue
        try:
            use = _use(field, str(name), given, (*path, str(name)), report)
        except Mistake as mistake:
            report((*path, str(name)), mistake.message, mistake.hint)
            use = None
        sound = sound and use is not None
        found[str(name)] = use or {}
    try:
        return kept(field, found) if sound else None
    except Mistake as mistake:
        report(path, mistake.message, mistake.hint)
        return None


def _use(field: Field, name: str, given: object, path: Path, report: Report) -> Values | None:
    kind = kind_of(field, name)
    if field.main and isinstance(given, (int, float, str)):
        given = {field.main: given}
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise Mistake(f"must be a mapping of its parameters, not {brief(given)}")
    known = parameters_of(field, kind)
    values: dict[str, object] = {}
    sound = True
    for word, value in given.items():
        try:
            if word not in known:
                raise Mistake(f"is no parameter of {field.word} {name!r}", _near(str(word), known))
            values[word] = known[word].typed(value)
        except Mistake as mistake:
            report((*path, str(word)), mistake.message, mistake.hint)
            sound = False
    for word, parameter in known.items():
        if word not in given and _default(parameter, field) is dataclasses.MISSING:
            report((*path, word), "is required", "")
            sound = False
    return values if sound else None


def kept(field: Field, uses: Uses) -> Uses:
    """Return `uses` without what has no effect: a coefficient of 0, parameters at their defaults. Raises Mistake."""
    found: dict[str, Values] = {}
    for name, values in uses.items():
        if field.main and not values.get(field.main):
            continue
        kind = kind_of(field, name)
        given = {word: value for word, value in values.items() if word != field.main}
        try:
            if kind.parameters is not None:
                kind.parameters(**given)
        except (TypeError, ValueError) as error:
            raise Mistake(f"{field.word} {name!r}: {error}") from None
        known = parameters_of(field, kind)
        found[name] = {word: value for word, value in values.items() if value != _default(known[word], field)}
    return found


def _default(parameter: Field, field: Field) -> object:
    """Return a parameter's default, MISSING without one: what a bare number sets has none."""
    if parameter.name == field.main:
        return dataclasses.MISSING
    own = next(one for one in dataclasses.fields(parameter.owner) if one.name == parameter.name)
    return own.default if own.default_factory is dataclasses.MISSING else own.default_factory()


def _near(word: str, known: Mapping[str, Field]) -> str:
    return did_you_mean(word, known, "parameters") if known else "it has none"
