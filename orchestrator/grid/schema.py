"""The JSON Schema of a grid file, for editors: sections, factors with their types, fields of a cell."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Any

from orchestrator import resources
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.grid.adaptive import MOST_SEEDS, RACES
from orchestrator.grid.factors import (
    GRANULARITY,
    factor_field,
    find_factor,
    not_factors,
    open_fields,
    short_names,
)
from orchestrator.grid.search import KINDS
from orchestrator.spec import cell as cells
from orchestrator.spec.cell import Cell
from orchestrator.spec.descriptions import descriptions
from orchestrator.spec.fields import Field, dataclass_in, field_paths, fields_of
from orchestrator.spec.rules import PHASES, STAGE_RESOURCES, Rule
from orchestrator.spec.units import EXAMPLES

Schema = dict[str, Any]
NAMES: Schema = {"type": "array", "items": {"type": "string"}}
ADAPTIVE: Schema = {
    "type": "object",
    "description": "seeds are added until the mean of each setting is known well enough, or differences are decided",
    "required": ["metric"],
    "oneOf": [{"required": ["halfwidth"]}, {"required": ["race"]}],
    "additionalProperties": False,
    "properties": {
        "metric": {"type": "string"},
        "halfwidth": {"type": "number", "exclusiveMinimum": 0, "description": "of a setting's 95 % interval"},
        "race": {"enum": list(RACES), "description": "the differences that seeds shall decide"},
        "max_seeds": {"type": "integer", "minimum": 2, "maximum": MOST_SEEDS},
    },
}


def grid_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a grid file."""
    values = {name: _factor(name) for name in _factor_names()}
    condition = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"anyOf": [value, {"type": "array", "items": value}]} for name, value in values.items()},
        "patternProperties": _of_declarations(),
    }
    product: Schema = {
        "type": "object",
        "properties": {
            name: {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]} for name, value in values.items()
        },
        # A paired axis: "a, b" with one list of values per row. Below a declaration's name its own types hold.
        "patternProperties": {
            "^[^,]+(,[^,]+)+$": {"type": "array", "items": {"type": "array"}, "minItems": 1},
            **_of_declarations(),
        },
        "additionalProperties": False,
    }
    sections: Schema = {
        "description": {"type": "string"},
        "factors": {"$ref": "#/$defs/product", "description": "the axes: every combination of their values is a cell"},
        "also": {"type": "array", "items": {"$ref": "#/$defs/product"}, "description": "more products, unioned"},
        "exclude": {"type": "array", "items": {"$ref": "#/$defs/condition"}},
        "priority": {
            "type": "array",
            "items": {"$ref": "#/$defs/condition"},
            "description": "cells that meet an earlier condition run first",
        },
        "when": {"type": "object", "additionalProperties": {"$ref": "#/$defs/condition"}},
        "with": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/$defs/companions"}},
            "description": "by factor and value: other fields that go with it, null where a phase is left out",
        },
        "baseline": {"$ref": "#/$defs/values"},
        "evaluate": {"type": "array", "items": {"enum": list(SUITES.names())}, "minItems": 1, "uniqueItems": True},
        "at": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "minItems": 1},
        "primary": {**NAMES, "description": "the columns that decide at this scale"},
        "set": {"$ref": "#/$defs/set", "description": "fields of every cell, nested or as dotted paths"},
        "search": {"$ref": "#/$defs/search"},
        "adaptive": {"$ref": "#/$defs/adaptive"},
        "runnable": {"type": "string", "description": "why this grid cannot run on this machine"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moegrid grid",
        "type": "object",
        "required": ["base"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"},
            "base": {"enum": sorted(resources.files("recipe"))},
            "include": {"anyOf": [{"type": "string"}, NAMES]},
            "plugins": {"anyOf": [{"type": "string"}, NAMES], "description": "files that declare names of your own"},
            "scales": {"type": "object", "additionalProperties": {"$ref": "#/$defs/overlay"}},
            **sections,
        },
        "$defs": {
            "product": product,
            "condition": condition,
            "values": {
                "type": "object",
                "properties": values,
                "patternProperties": _of_declarations(),
                "additionalProperties": False,
            },
            "companions": {
                "type": "object",
                "properties": values | {phase: {"type": "null"} for phase in PHASES},
                "patternProperties": {**_of_declarations(), r"^execution\.resources\.[a-z]+\.[a-z_]+$": {}},
                "additionalProperties": False,
            },
            "overlay": {"type": "object", "properties": sections, "additionalProperties": False},
            "search": _search(values),
            "adaptive": ADAPTIVE,
            "set": {
                **_object(Cell),
                "patternProperties": {r"^[a-z_]+(\.[a-z_]+)+$": {}, **_of_declarations()},
                "properties": {
                    **_object(Cell)["properties"],
                    **{".".join(path): _value(field) for path, field in field_paths().items()},
                    "model.active_width": {"type": "integer", "minimum": 1},
                },
            },
        },
    }


def _factor_names() -> list[str]:
    names = dict.fromkeys(name for phase in PHASES for name in short_names(phase, phase))
    dotted = [".".join(path) for path, field in field_paths().items() if field.registry is None]
    return [*names, *(name for name in dotted if not not_factors(name))]


def _of_declarations() -> Schema:
    """Return what may be written for `losses.NAME` and `losses.NAME.PARAMETER`: the declaration's types are its own."""
    heads = "|".join(sorted(open_fields("finetune")))
    return {rf"^([a-z_]+\.)*({heads})\.[^,]+$": {}}


def _factor(name: str) -> Schema:
    if name == GRANULARITY:
        return {"type": "string", "pattern": r"^\d+/\d+(\+\d+)?$", "description": "top_k/num_experts[+shared]"}
    field = factor_field(find_factor(name, "finetune", "finetune"))
    assert field is not None
    return _value(field)


def _value(field: Field) -> Schema:
    described = {"description": descriptions(field.owner)[field.name]}
    return described | _undescribed(field)


def _undescribed(field: Field) -> Schema:
    if field.owner is cells.TrainSpec and field.name == "steps":
        return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "description": EXAMPLES}]}
    if field.registry is not None:
        return _declared(field)
    if field.name == "resources":
        kind = _object(cells.Resources)
        return {"type": "object", "properties": dict.fromkeys(STAGE_RESOURCES, kind), "additionalProperties": False}
    if field.name == "tasks" and field.owner is cells.EvaluateSpec:
        task = _object(cells.TaskSpec)
        by_name = {name: {"anyOf": [task, {"const": False}, {"type": "null"}]} for name in TASKS.names()}
        return _named(by_name, TASKS.names(), task)
    if field.name == "corpora":
        return {"type": "object", "additionalProperties": _object(cells.CorpusSpec)}
    if field.name == "pictures":
        return {"type": "object", "additionalProperties": _object(cells.PicturesSpec)}
    if field.name == "judges":
        judge = _object(cells.JudgeSpec)
        by_name = {name: {"anyOf": [judge, {"const": False}, {"type": "null"}]} for name in JUDGES.names()}
        return _named(by_name, JUDGES.names(), judge)
    return _typed(field.hint, field.rule)


def _declared(field: Field) -> Schema:
    """Return the schema of a field that names declarations of other packages: their parameters are their own."""
    given = [{"type": "object"}, {"type": ["boolean", "null"]}, *([{"type": "number"}] if field.main else [])]
    mapping: Schema = {"type": "object", "additionalProperties": {"anyOf": given}}
    return mapping if field.main else {"anyOf": [mapping, NAMES]}


def _named(by_name: Schema, names: Iterable[str], one: Schema) -> Schema:
    mapping = {"type": "object", "properties": by_name, "additionalProperties": False}
    return {"anyOf": [mapping, {"type": "array", "items": {"anyOf": [{"enum": list(names)}, one]}}]}


def _typed(hint: Any, rule: Rule | None) -> Schema:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_typed(next(arg for arg in args if arg is not type(None)), rule), {"type": "null"}]}
    if origin is tuple:
        size = {} if args[-1] is Ellipsis else {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": _typed(args[0], rule), **size}
    if rule is not None and rule.names is not None:
        return {"enum": list(rule.names.names())}
    if hint is Parameters:
        return {"type": "object", "description": "parameters of the kind, by name"}
    schema: Schema = {"type": {int: "integer", float: "number", str: "string", bool: "boolean"}[hint]}
    if rule is None:
        return schema
    if rule.choices:
        return {"enum": list(rule.choices)}
    bounds = {"minimum": rule.low, "exclusiveMinimum": rule.above, "maximum": rule.high}
    return {**schema, **{name: bound for name, bound in bounds.items() if bound is not None}}


def _object(owner: type) -> Schema:
    properties: Schema = {}
    for name, field in fields_of(owner).items():
        inner = dataclass_in(field.hint)
        if inner is None:
            properties[name] = _value(field)
        else:
            value = _object(inner) if inner is field.hint else {"anyOf": [_object(inner), {"type": "null"}]}
            properties[name] = {"description": descriptions(owner)[name], **value}
    if owner is fields_of(Cell)["model"].hint:
        properties["active_width"] = {"type": "integer", "minimum": 1, "description": "kept equal by granularity"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _search(values: Schema) -> Schema:
    distribution = {
        "type": "object",
        "properties": {kind: {"type": "array", "minItems": 1} for kind in KINDS},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    scheduler = {
        "type": "object",
        "properties": {
            "name": {"enum": ["fifo", "asha"]},
            "grace": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "reduction": {"type": "integer", "minimum": 2, "maximum": 16},
        },
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "required": ["space", "metric"],
        "additionalProperties": False,
        "properties": {
            "space": {
                "type": "object",
                "properties": dict.fromkeys(values, distribution),
                "patternProperties": dict.fromkeys(_of_declarations(), distribution),
                "additionalProperties": False,
                "minProperties": 1,
            },
            "metric": {"type": "string"},
            "mode": {"enum": ["min", "max"]},
            "trials": {"type": "integer", "minimum": 1},
            "concurrency": {"type": "integer", "minimum": 1},
            "seed": {"type": "integer", "minimum": 0},
            "scheduler": {"anyOf": [{"enum": ["fifo", "asha"]}, scheduler]},
        },
    }
