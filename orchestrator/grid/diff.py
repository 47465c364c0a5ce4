"""What differs between two cells: why something is new, what a change touches, whether a comparison is fair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.files.problems import Mistake
from orchestrator.grid.expand import GridCell
from orchestrator.grid.factors import find_factor
from orchestrator.grid.sections import NEW_PHASES, SCIENCE
from orchestrator.spec.cell import Cell
from orchestrator.spec.identity import plain

Difference = tuple[str, Any, Any]  # dotted path, old value, new value


def differences(old: object, new: object) -> list[Difference]:
    """Return where two cells (typed, or as plain sections) differ in science: (path, old, new).

    Any two JSON values can be compared, such as the payloads of two stages.
    """
    return _differ("", _science(old), _science(new))


def _science(value: object) -> Any:
    value = value.cell if isinstance(value, GridCell) else value
    if isinstance(value, Cell):
        return {name: plain(getattr(value, name)) for name in SCIENCE}
    if isinstance(value, Mapping) and set(SCIENCE) - NEW_PHASES <= set(value):
        return {name: value.get(name) for name in SCIENCE}
    return plain(value)


def _by_name(value: object) -> Mapping[str, object] | None:
    """Return a list of things with names, such as tasks, by them; None for another value."""
    if not isinstance(value, Sequence) or not all(isinstance(one, Mapping) and "name" in one for one in value):
        return None
    found = {str(one["name"]): {key: own for key, own in one.items() if key != "name"} for one in value}
    return found if found and len(found) == len(value) else None


def _differ(path: str, old: object, new: object) -> list[Difference]:
    before, after = _by_name(old), _by_name(new)
    if before is not None and after is not None and [*before] != [*after][: len(before)] and {*before} == {*after}:
        return [(f"{path} (order)", [*before], [*after]), *_differ(path, before, after)]
    if before is not None and after is not None:
        old, new = before, after
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new and type(old) is type(new) else [(path, old, new)]
    found: list[Difference] = []
    for key in dict.fromkeys([*old, *new]):
        inner = f"{path}.{key}" if path else str(key)
        if key in old and key in new:
            found.extend(_differ(inner, old[key], new[key]))
        else:
            found.append((inner, old.get(key), new.get(key)))
    return found


def guard(a: object, b: object, factor: str) -> list[str]:
    """Return what else than `factor` and the seeds differs between two cells, as `path: value | value`.

    An empty list: the comparison is fair. Cells may be typed or plain sections. Paired factors are separated by commas;
    `preset` covers the fields of the block that it fills in.
    """
    science = _science(a)
    phase = next((name for name in ("instruct", "finetune") if science[name] is not None), "pretrain")
    allowed = {"seed"}
    for name in factor.split(","):
        try:
            allowed |= {".".join(path) for path in find_factor(name.strip(), phase, phase).paths}
        except Mistake:
            continue
        if name.strip() in ("preset", "variant"):
            allowed.add("model.moe")
    return [
        f"{path}: {old} | {new}"
        for path, old, new in differences(a, b)
        if not any(path == one or path.startswith(f"{one}.") for one in allowed)
    ]
