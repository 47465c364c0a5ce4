"""Frozen dataclasses from the JSON types that they were written as."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from orchestrator.catalog.parameters import Parameters
from orchestrator.spec.identity import renamed


@cache
def _hints(cls: type) -> dict[str, Any]:
    return {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}


def build(hint: Any, value: Any) -> Any:
    """Turn JSON types into the frozen dataclasses and tuples that the type `hint` names."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = _hints(hint)
        fields = {name: build(hints[name], item) for name, item in value.items()}
        for name, before in renamed(hint).items():  # a document may hold the former name
            now = {old: new for new, old in before.items()}
            if name in fields:
                fields[name] = now.get(fields[name], fields[name])
        return hint(**fields)
    if hint is Parameters:
        return Parameters(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return build(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(build(args[0], item) for item in value)
        return tuple(build(arg, item) for arg, item in zip(args, value, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: build(args[1], item) for key, item in value.items()}
    if hint is float and isinstance(value, int):
        return float(value)
    return value
