"""The rotary positions that a public checkpoint's config.json describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from orchestrator.errors import SourceError
from orchestrator.spec.attention import SCALINGS, RopeSpec
from orchestrator.spec.public_blocks import Fields

_PLAIN = "default"
# What a config.json calls a field of ours, where it has another name for it.
_ORIGINAL = "original_max_position_embeddings"


# What has no default, beside the factor, and what of it are lists: a number for each frequency.
_LISTS = ("short_factor", "long_factor")
_NEEDED = {"llama3": ("low_freq_factor", "high_freq_factor"), "longrope": _LISTS}


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
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as earlier releases called it
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
    if kind in ("yarn", "longrope") and own.get("factor") is None and isinstance(context, int):
        own["factor"] = context / own[_ORIGINAL]
    needed = ("factor", *_NEEDED.get(kind, ()))
    names = {field: _ORIGINAL if field == "original_context" else field for field in SCALINGS[kind]}
    stated = {field: public for field, public in names.items() if public in needed or own.get(public) is not None}
    values: dict[str, object] = {"scaling": kind}
    for field, public in stated.items():
        value, is_right = own.get(public), _IS.get(field, _is_number)
        if not is_right(value):
            raise _refused(config, f"{name}.{public} is {value!r}")
        values[field] = _AS.get(field, float)(value)
    if kind != "yarn" and given.get("mscale_all_dim"):
        raise _refused(config, f"{name}.mscale_all_dim is {given['mscale_all_dim']!r} with rope_type {kind!r}")
    whole: Fields = values
    return RopeSpec(**whole)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_number, value))


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


_IS: Mapping[str, Callable[[object], bool]] = {
    "truncate": lambda value: isinstance(value, bool),
    **dict.fromkeys(_LISTS, _are_numbers),
}
_AS: Mapping[str, Callable[..., object]] = {"original_context": int, "truncate": bool, **dict.fromkeys(_LISTS, _floats)}


def _refused(config: Fields, cause: str) -> SourceError:
    return SourceError(f"a checkpoint of type {config.get('model_type')!r} cannot be imported", cause=cause)
