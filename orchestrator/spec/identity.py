"""Science keys: what defines a result is hashed, how it was computed never is.

A key is the sha256 of canonical JSON. Canonical: sorted keys, no white space, integral floats written
like any other float (1.0 and 1 differ in type, so fields are typed before they are hashed), no NaN. A field declared
`NEUTRAL` is left out while it has its default, which means "not used": results made without it keep their keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

# A kind's version enters every key of that kind: raise it when the meaning of the computation changes.
KIND_VERSIONS: dict[str, int] = {
    "data": 1,
    "tokenizer": 1,
    "tokens": 1,
    "features": 1,
    "init": 1,
    "train": 1,
    "evaluate": 2,
    "generate": 1,
    "judge": 1,
}
NEUTRAL: Mapping[str, bool] = MappingProxyType({"neutral": True})


def parameters_of(kind: str) -> Mapping[str, Any]:
    """Return the metadata of a field that holds the parameters of the kind which the field `kind` names."""
    return MappingProxyType({**NEUTRAL, "of": kind})


def named_before(names: Mapping[str, str]) -> Mapping[str, object]:
    """Return the metadata of a field some of whose values were renamed: value -> the name that keys hold."""
    return MappingProxyType({"before": names})


@cache
def renamed(cls: type) -> Mapping[str, Mapping[str, str]]:
    """Return the fields of a dataclass some of whose values were renamed, with the name that keys hold of each."""
    return {one.name: one.metadata["before"] for one in dataclasses.fields(cls) if one.metadata.get("before")}


# A field that the plan fills in for the node to check: no field of a grid, and in no key.
DERIVED: Mapping[str, bool] = MappingProxyType({"derived": True})


@cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def plain(value: object) -> Any:
    """Return `value` as JSON types: dataclasses become dicts, tuples become lists."""
    cls = type(value)
    if cls in _ATOMS:
        return value
    if dataclasses.is_dataclass(cls):
        return {name: plain(getattr(value, name)) for name in _field_names(cls)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


_ATOMS = frozenset((str, int, float, bool, type(None)))


@cache
def _fields_in_order(cls: type) -> tuple[tuple[str, str], ...]:
    """Return (name, `"name":`) of the hashed fields in the order of canonical JSON."""
    hashed = (field.name for field in dataclasses.fields(cls) if not field.metadata.get("derived"))
    return tuple((name, f'"{name}":') for name in sorted(hashed))


@cache
def _neutral(cls: type) -> Mapping[str, Any]:
    """Return the fields that are left out at their default, with that default."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get("neutral"):
            made = field.default_factory
            found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


class Canonical:
    """Writes canonical JSON; the text of each frozen dataclass is made once, since cells share their sections.

    Texts are remembered by object, not by value: 1, 1.0 and True are equal and hash alike, but are not the same JSON.
    """

    LIMIT = 200_000

    def __init__(self) -> None:
        self._texts: dict[int, tuple[Any, str]] = {}

    def text(self, value: Any) -> str:
        """Return the canonical JSON text of `value` (JSON types, tuples, mappings, dataclasses)."""
        cls = type(value)
        if cls is str:
            return _quote(value)
        if value is None:
            return "null"
        if cls is bool:
            return "true" if value else "false"
        if cls is int:
            return int.__repr__(value)
        if cls is float:
            if value - value != 0.0:
                raise ValueError("numbers that are not finite have no canonical JSON")
            return float.__repr__(value)
        if cls is tuple or cls is list:
            return f"[{','.join(map(self.text, value))}]"
        if dataclasses.is_dataclass(cls):
            known = self._texts.get(id(value))
            if known is not None and known[0] is value:
                return known[1]
            text = self.text_of_fields(value)
            if len(self._texts) >= self.LIMIT:
                self._texts.clear()
            self._texts[id(value)] = (value, text)
            return text
        if isinstance(value, Mapping):
            items = sorted((str(key), item) for key, item in value.items())
            return "{" + ",".join([f"{_quote(key)}:{self.text(item)}" for key, item in items]) + "}"
        return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)

    def text_of_fields(self, value: object) -> str:
        """Return the text of a dataclass without remembering it."""
        cls: type = type(value)
        fields: Sequence[tuple[str, str]] = _fields_in_order(cls)
        if neutral := _neutral(cls):
            fields = [field for field in fields if getattr(value, field[0]) != neutral.get(field[0], _KEPT)]
        if before := renamed(cls):
            texts = [mark + self.text(_former(before, name, getattr(value, name))) for name, mark in fields]
            return "{" + ",".join(texts) + "}"
        return "{" + ",".join([mark + self.text(getattr(value, name)) for name, mark in fields]) + "}"


def _former(before: Mapping[str, Mapping[str, str]], name: str, value: str) -> object:
    return before[name].get(value, value) if name in before else value


_KEPT = object()
_quote = json.encoder.encode_basestring
_CANONICAL = Canonical()
canonical_text = _CANONICAL.text


def canonical(value: object) -> bytes:
    """Return the canonical JSON bytes of `value` (dataclasses allowed)."""
    return canonical_text(value).encode()


def digest(value: object) -> str:
    """Return the sha256 hex digest of `value`'s canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def science_text(
    kind: str, fields: object, parents: Sequence[str] = (), versions: Mapping[str, int | str] = MappingProxyType({})
) -> str:
    """Return the canonical JSON whose sha256 is the key of what `kind` makes from `fields` and its parents' keys.

    `versions` are those of what decides its meaning, without versions of 1, and what stands for outsiders' parts
    (orchestrator.spec.versions).
    """
    text = _CANONICAL.text_of_fields(fields) if dataclasses.is_dataclass(fields) else canonical_text(fields)
    of_parts = f',"versions":{canonical_text(versions)}' if versions else ""
    return (
        f'{{"fields":{text},"kind":"{kind}","parents":{canonical_text(list(parents))},'
        f'"version":{KIND_VERSIONS[kind]}{of_parts}}}'
    )


def science_key(
    kind: str, fields: object, parents: Sequence[str] = (), versions: Mapping[str, int | str] = MappingProxyType({})
) -> str:
    """Return the key of the artifact that `kind` makes from `fields` and its parents' keys (see `science_text`)."""
    return hashlib.sha256(science_text(kind, fields, parents, versions).encode()).hexdigest()


Span = tuple[str, int, int]  # (digest of the training conditions, from step, to step)


def lineage(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Merge adjacent spans of equal conditions, drop empty ones: where a run was cut leaves no trace."""
    merged: list[Span] = []
    for conditions, start, stop in spans:
        if start == stop:
            continue
        if merged and merged[-1][0] == conditions and merged[-1][2] == start:
            merged[-1] = (conditions, merged[-1][1], stop)
        else:
            merged.append((conditions, start, stop))
    return tuple(merged)


def state_key(init: str, spans: Sequence[Span]) -> str:
    """Return the key of the training state after `spans`, starting from the artifact `init`.

    A state after no step is the initial artifact itself.
    """
    merged = lineage(spans)
    if not merged:
        return init
    return state_keys(init, merged[:-1], merged[-1][0], merged[-1][1], [merged[-1][2]])[0]


def state_keys(init: str, history: Sequence[Span], conditions: str, start: int, steps: Sequence[int]) -> list[str]:
    """Return the keys of the states at `steps` of one span that began at `start` after `history`.

    Cheap enough (about 1 us a step) to look for every step at which a checkpoint could lie.
    """
    # The canonical JSON of these six, written out: a large grid has a line for each training segment.
    text = (
        f'{{"conditions":{_quote(conditions)},"from":{start},"history":{canonical_text(lineage(history))},'
        f'"init":{_quote(init)},"kind":"train","version":{KIND_VERSIONS["train"]}}}'
    )
    line = hashlib.sha256(text.encode()).hexdigest()
    return [hashlib.sha256(f"{line}@{step}".encode()).hexdigest() for step in steps]
