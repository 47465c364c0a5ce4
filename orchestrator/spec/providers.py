"""Which names from outside a stage uses, and who provides them: what its job must bring along, and what it records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import registry
from orchestrator.catalog.engines import ENGINES
from orchestrator.registry import Origin
from orchestrator.spec import versions
from orchestrator.spec.work import EvaluateWork, GenerateWork, TrainWork, Work

# Groups whose code runs where the driver runs.
DRIVERS = ("backends", "trackers")


@dataclass(frozen=True, slots=True)
class Use:
    """A distribution or plugin file, and which of its names are used, by the group of its kind ("routers")."""

    origin: Origin
    names: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        provided = "; ".join(f"{group}: {', '.join(names)}" for group, names in self.names.items())
        return f"{self.origin} ({provided})"

    def to_json(self) -> dict[str, Any]:
        origin = self.origin
        names = {group: list(names) for group, names in self.names.items()}
        return {"provider": origin.provider, "version": origin.version, "file": origin.file, "names": names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Use:
        names = {group: tuple(names) for group, names in data["names"].items()}
        return cls(Origin(data["provider"], data["version"], data["file"]), names)


def uses_of(work: Work, engine: str = "") -> tuple[Use, ...]:
    """Return who provides what a stage needs from outside, () as a rule; `engine` is that of its execution."""
    if not registry.anything_outside():
        return ()
    return _uses(provided for name in names_of(work, engine) if (provided := registry.provided(name)) is not None)


def names_of(work: Work, engine: str = "") -> Iterator[str]:
    """Yield "WORD NAME" of all that a node needs for `work`: what is in its key, and the model that it loads."""
    yield from work.parts()
    if isinstance(work, (TrainWork, EvaluateWork, GenerateWork)):
        yield from versions.of_model(work.model)
    if engine and isinstance(work, TrainWork):
        yield f"{ENGINES.word} {engine}"


def of_driver() -> tuple[Use, ...]:
    """Return who provides what the driver uses from outside: no result depends on it."""
    registries = [registry.REGISTRIES[group] for group in DRIVERS if group in registry.REGISTRIES]
    return _uses((one.group, name, found.origin) for one in registries for name, found in one.outside.items())


def of_all(uses: Iterable[Use]) -> tuple[Use, ...]:
    """Return the uses of several stages as one each of their providers."""
    return _uses((group, name, use.origin) for use in uses for group, names in use.names.items() for name in names)


def _uses(provided: Iterable[tuple[str, str, Origin]]) -> tuple[Use, ...]:
    found: dict[Origin, dict[str, dict[str, None]]] = {}
    for group, name, origin in provided:
        found.setdefault(origin, {}).setdefault(group, {})[name] = None
    return tuple(
        Use(origin, {group: tuple(sorted(names)) for group, names in sorted(groups.items())})
        for origin, groups in sorted(found.items(), key=lambda item: (item[0].provider, item[0].version))
    )
