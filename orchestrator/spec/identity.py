"""Science keys: what defines a result is hashed, how it was computed never is.

A key is the sha256 of canonical JSON. Canonical: sorted keys, no white space, integral floats written
like any other float (1.0 and 1 differ in type, so fields are typed before they are hashed), no NaN.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# A kind's version enters every key of that kind: raise it when the meaning of the computation changes.
KIND_VERSIONS: dict[str, int] = {
    "data": 1,
    "tokenizer": 1,
    "tokens": 1,
    "init": 1,
    "train": 1,
    "evaluate": 1,
}


@lru_cache(maxsize=None)
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def plain(value: Any) -> Any:
    """Return `value` as JSON types: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in _field_names(type(value))}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def canonical(value: Any) -> bytes:
    """Return the canonical JSON bytes of `value` (dataclasses allowed)."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Return the sha256 hex digest of `value`'s canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def science_key(kind: str, fields: Any, parents: Sequence[str] = ()) -> str:
    """Return the key of the artifact that `kind` makes from `fields` and its parents' keys."""
    return digest({"kind": kind, "version": KIND_VERSIONS[kind], "fields": fields, "parents": list(parents)})


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
    line = digest(
        {
            "kind": "train",
            "version": KIND_VERSIONS["train"],
            "init": init,
            "history": [list(span) for span in lineage(history)],
            "conditions": conditions,
            "from": start,
        }
    )
    return [hashlib.sha256(f"{line}@{step}".encode()).hexdigest() for step in steps]
