"""The reference of all fields of a cell as Markdown: path, type, default, bounds and meaning, from the types."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from orchestrator.grid.schema import grid_schema
from orchestrator.spec.cell import Cell
from orchestrator.spec.descriptions import descriptions
from orchestrator.spec.fields import dataclass_in, fields_of
from orchestrator.spec.rules import STAGE_RESOURCES, Rule


def reference() -> str:
    """Return the page: the sections of a grid file, then a table of fields for every part of a cell."""
    lines = [
        "# Reference of all fields",
        "",
        "Made from the types: `moegrid schema` writes the same as a JSON Schema, for editors.",
        "",
        "## Sections of a grid file",
        "",
        *(f"- `{name}`{_told(section)}" for name, section in grid_schema()["properties"].items()),
    ]
    seen: set[type] = set()
    for title, owner in _parts("", Cell):
        if owner in seen or owner is Cell:
            continue
        seen.add(owner)
        lines += ["", f"## {title}", "", *_table(owner)]
    return "\n".join(lines) + "\n"


def _told(section: dict[str, Any]) -> str:
    return f": {section['description']}" if "description" in section else ""


def _parts(path: str, owner: type) -> Iterator[tuple[str, type]]:
    """Yield (path, dataclass) of a cell's parts, an outer one before its inner ones."""
    yield path, owner
    for name, field in fields_of(owner).items():
        inside = f"{path}.{name}".lstrip(".")
        if (inner := dataclass_in(field.hint)) is not None:
            yield from _parts(inside, inner)
        elif "[" in str(field.hint):
            for argument in getattr(field.hint, "__args__", ()):
                if dataclasses.is_dataclass(argument):
                    assert isinstance(argument, type)
                    yield from _parts(f"{inside} (each)", argument)


def _table(owner: type) -> Iterator[str]:
    yield "| field | type | default | |"
    yield "| --- | --- | --- | --- |"
    defaults = {field.name: field for field in dataclasses.fields(owner)}
    for name, field in fields_of(owner).items():
        inner = dataclass_in(field.hint)
        kind = f"see `{name}`" if inner is not None else _kind(field.hint, field.rule)
        meaning = descriptions(owner)[name].replace("|", r"\|")
        if name == "resources":
            kind = f"by {', '.join(STAGE_RESOURCES)}"
        yield f"| `{name}` | {kind} | {_default(defaults[name])} | {meaning} |"


def _kind(hint: Any, rule: Rule | None) -> str:
    arguments = [argument for argument in getattr(hint, "__args__", ()) if argument is not type(None)]
    if getattr(hint, "__origin__", None) is tuple:
        return f"list of {_kind(arguments[0], rule)}"
    if arguments:
        return f"{_kind(arguments[0], rule)}, or empty"
    name = {int: "integer", float: "number", str: "text", bool: "true or false"}.get(hint, hint.__name__)
    if rule is None:
        return str(name)
    if rule.choices:
        return ", ".join(f"`{choice}`" for choice in rule.choices if choice != "")
    bounds = [
        text
        for text, bound in (("≥", rule.low), (">", rule.above), ("≤", rule.high))
        if bound is not None
        for text in [f"{text} {bound:g}"]
    ]
    return " ".join([str(name), *bounds])


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "required"
    if field.default is None or field.default in ("", ()):
        return ""
    value = field.default
    items = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{getattr(item, 'name', item)}`" for item in items)
