"""The rotary positions that a public checkpoint's config.json describes."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import SourceError
from orchestrator.spec.attention import SCALINGS, RopeSpec
from orchestrator.spec.public_blocks import Fields

_PLAIN = "default"
# What a config.json calls a field of ours, where it has another name for it.
_ORIGINAL = "original_max_position_embeddings"


def rope_fields(config: Fields) -> tuple[str, Fields]:
    """Return the name of the field that says how positions turn, and what it says; the older name counts first."""
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name):
            return name, config[name]
    return "rope_parameters", {}


def rope_theta(config: Fields) -> float:
    """Return the base of the rotary positions."""
    return float(rope_fields(config)[1].get("rope_theta") or config.get("rope_theta") or 10000.0)


def rotary_fraction(config: Fields) -> float:
    """Return how much of a head turns."""
    said = rope_fields(config)[1].get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return 1.0 if said is None else float(said)


def rope_of(config: Fields) -> RopeSpec:
    """Return how a config.json stretches its rotary positions. Raises SourceError where we have no such way."""
    name, given = rope_fields(config)
    kind = given.get("rope_type") or given.get("type") or _PLAIN
    layers = [key for key, value in given.items() if isinstance(value, Mapping)]
    if layers or (kind != _PLAIN and kind not in SCALINGS):
        known = ", ".join((_PLAIN, *filter(None, SCALINGS)))
        said = f"{name} has {', '.join(layers)}" if layers else f"{name}.rope_type is {kind!r} (known: {known})"
        raise _refused(config, said)
    if kind == _PLAIN:
        return RopeSpec()
    context = config.get("max_position_embeddings")
    own = {_ORIGINAL: config[_ORIGINAL]} if config.get(_ORIGINAL) and kind != "dynamic" else {}
    own = {_ORIGINAL: context, **given, **own} if kind != "dynamic" else {**given, _ORIGINAL: context}
    if kind == "yarn" and own.get("factor") is None and isinstance(context, int):
        own["factor"] = context / own[_ORIGINAL]
    needed = ("factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()))
    names = {field: _ORIGINAL if field == "original_context" else field for field in SCALINGS[kind]}
    stated = {field: public for field, public in names.items() if public in needed or own.get(public) is not None}
    for field, public in stated.items():
        value = own.get(public)
        if isinstance(value, bool) is not (field == "truncate") or not isinstance(value, (int, float)):
            raise _refused(config, f"{name}.{public} is {value!r}")
    kinds = {"original_context": int, "truncate": bool}
    values: Fields = {field: kinds.get(field, float)(own[public]) for field, public in stated.items()}
    if kind != "yarn" and given.get("mscale_all_dim"):
        raise _refused(config, f"{name}.mscale_all_dim is {given['mscale_all_dim']!r} with rope_type {kind!r}")
    return RopeSpec(scaling=kind, **values)


def _refused(config: Fields, cause: str) -> SourceError:
    return SourceError(f"a checkpoint of type {config.get('model_type')!r} cannot be imported", cause=cause)
