"""Nested plain data becomes a cell of frozen dataclasses; everything wrong in it is reported with its place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orchestrator.catalog.tasks import TASKS
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake, Problems, brief
from orchestrator.grid.declared import read_uses
from orchestrator.grid.vocabulary import meaning
from orchestrator.spec import cell as cells
from orchestrator.spec.fields import Field, Path, dataclass_in, field_paths, fields_of
from orchestrator.spec.rules import STAGE_RESOURCES
from orchestrator.spec.tasks import published
from orchestrator.spec.units import Length

# What to write where a named thing is no mapping.
_EXAMPLES: Mapping[type, str] = {
    cells.TaskSpec: "write {shots: 5}",
    cells.PicturesSpec: "write {source: ..., tasks: [...]}",
    cells.CorpusSpec: "write {source: ..., weight: 1}",
    cells.JudgeSpec: "write {source: ...}",
}


class Builder:
    """Builds a cell from nested plain data; `place(path)` says where a path was written, hints prefer `phase`."""

    def __init__(self, problems: Problems, place: Callable[[Path], str], phase: str) -> None:
        self.problems = problems
        self.place = place
        self.phase = phase
        self.lengths: dict[str, Length] = {}

    def build(self, owner: type, data: object, path: Path) -> Any:
        """Return an `owner` made of `data`, or None when something was wrong with it."""
        if not isinstance(data, Mapping):
            self._add(path, f"must be a mapping, not {brief(data)}")
            return None
        fields = fields_of(owner)
        for name in data:
            if name not in fields:
                known = [".".join((*path, known)) for known in fields]
                self.problems.add(
                    f"{'.'.join((*path, str(name)))!r} is not a field of a cell",
                    self.place((*path, str(name))),
                    ".".join((*path, str(name))),
                    near_field((*path, str(name)), known, self.phase),
                )
        values: dict[str, object] = {}
        sound = True
        for name, field in fields.items():
            if name not in data:
                if field_required(owner, name):
                    self._add((*path, name), "is required")
                    sound = False
                continue
            try:
                values[name] = self._field(field, data[name], (*path, name))
            except Mistake as mistake:
                self._add((*path, name), mistake.message, mistake.hint)
                sound = False
            else:
                sound = sound and not (values[name] is None and data[name] is not None)
        return owner(**values) if sound else None

    def _field(self, field: Field, value: object, path: Path) -> Any:
        inner = dataclass_in(field.hint)
        if inner is not None:
            if value is None and inner is not field.hint:
                return None
            return self.build(inner, value, path)
        if path == ("evaluate", "tasks"):
            return self._named(cells.TaskSpec, value, path)
        if path[1:] == ("data", "corpora"):
            return self._named(cells.CorpusSpec, value, path)
        if path == ("evaluate", "pictures"):
            return self._named(cells.PicturesSpec, value, path)
        if path == ("evaluate", "judges"):
            return self._named(cells.JudgeSpec, value, path)
        if field.registry is not None:
            return read_uses(field, value, path, self._add)
        if path == ("execution", "resources"):
            return self._resources(value, path)
        result = field.typed(value)
        if isinstance(result, Length):
            self.lengths[path[0]] = result
            return 1
        return result

    def _named(self, owner: type, value: object, path: Path) -> Any:
        """Tasks, judges or corpora by name (`{arc_easy: {shots: 5}}`, merged by layer) or as a list."""
        if isinstance(value, Mapping):
            for name, spec in value.items():
                if not isinstance(spec, Mapping) and spec is not None and spec is not False:
                    raise Mistake(f"{name} must be a mapping of its fields, not {brief(spec)}", _EXAMPLES[owner])
            value = [{"name": name, **(spec or {})} for name, spec in value.items() if spec is not False]
        if not isinstance(value, list):
            raise Mistake(f"must be a mapping of {path[-1]} or a list of their names, not {brief(value)}")
        built = []
        for item in value:
            spec = {"name": item} if isinstance(item, str) else item
            name = spec.get("name") if isinstance(spec, Mapping) else None
            if owner is cells.TaskSpec and isinstance(name, str):
                spec = {**self._published(name), **spec}
            built.append(self.build(owner, spec, (*path, str(name)) if name else path))
        names = [one.name for one in built if one]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise Mistake(f"names {name!r} twice")
        return None if None in built else tuple(built)

    def _published(self, name: str) -> dict[str, object]:
        """Return what a task's declaration says; of a task that cannot be found its name's rule tells."""
        kind = None
        with contextlib.suppress(MoegridError):
            kind = TASKS.find(name)
        if kind is None:
            return {}
        try:
            task = published(kind)
        except MoegridError as error:
            raise Mistake("; ".join(filter(None, (error.error, error.cause))), error.hint) from None
        own = {"source": task.source, "revision": task.revision} if task.source else {}
        return {"shots": task.shots, "metric": task.metric, **own}

    def _resources(self, value: object, path: Path) -> Any:
        if not isinstance(value, Mapping):
            raise Mistake(f"must be a mapping, not {value!r}")
        for kind in value:
            if kind not in STAGE_RESOURCES:
                self._add((*path, str(kind)), "is not a kind of stage", did_you_mean(kind, STAGE_RESOURCES, "kinds"))
        built = {kind: self.build(cells.Resources, spec, (*path, kind)) for kind, spec in value.items()}
        return None if None in built.values() else built

    def _add(self, path: Path, message: str, hint: str = "") -> None:
        key = ".".join(path)
        self.problems.add(f"{key} {message}", self.place(path), key, hint)


def field_required(owner: type, name: str) -> bool:
    """Return whether the dataclass `owner` has no default for `name`."""
    field = next(f for f in dataclasses.fields(owner) if f.name == name)
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def near_field(path: Path, siblings: Iterable[str], phase: str) -> str:
    """Return a hint for the unknown field `path`: a sibling with a similar name, or a namesake elsewhere."""
    meant = meaning(path[-1], phase)
    if meant:
        return meant
    near = did_you_mean(".".join(path), siblings)
    if near.startswith("did you mean"):
        return near
    near = did_you_mean(path[-1], {known[-1] for known in field_paths()})
    if not near.startswith("did you mean"):
        return "moegrid schema lists every field"
    namesakes = [known for known in field_paths() if known[-1] == near.split("'")[1]]
    best = next((known for known in namesakes if known[0] == phase), namesakes[0])
    return f"did you mean {'.'.join(best)!r}?"
