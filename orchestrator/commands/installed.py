"""The installed packages that declare names, what they provide and what of it is broken: for `moegrid doctor`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator import catalog
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.registry import PREFIX, REGISTRIES, missing


@dataclass
class Package:
    """A distribution with entry points of ours: its names by group, and each thing that is wrong, with its remedy."""

    name: str
    version: str
    names: dict[str, list[str]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        provided = "; ".join(f"{group}: {', '.join(sorted(names))}" for group, names in sorted(self.names.items()))
        return f"{self.version} ({provided or 'nothing that works'})"


def packages() -> list[Package]:
    """Return the distributions with entry points `moegrid.<group>`, each of their declarations imported."""
    catalog.load_all()
    found: dict[tuple[str, str], Package] = {}
    for entry in _entry_points():
        name, version = (entry.dist.name, entry.dist.version) if entry.dist else (entry.value, "")
        package = found.setdefault((name, version), Package(name, version))
        group = entry.group.removeprefix(PREFIX)
        if (wrong := _wrong(group, entry.name)) is None:
            package.names.setdefault(group, []).append(entry.name)
        elif wrong not in package.broken:
            package.broken.append(wrong)
    return [found[key] for key in sorted(found)]


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    everything = importlib.metadata.entry_points()
    for group in sorted(everything.groups):
        if group.startswith(PREFIX):
            yield from everything.select(group=group)


def _wrong(group: str, name: str) -> tuple[str, str] | None:
    """Return what is wrong with one name and the remedy, None when it can be used."""
    known = REGISTRIES.get(group)
    if known is None:
        return f"entry points {PREFIX}{group} mean nothing", did_you_mean(group, REGISTRIES, "groups")
    if name in known.builtins:
        return f"{known.word} {name!r} is never used: moegrid has one of that name", "give it another name"
    try:
        declaration = known.get(name)
    except MoegridError as error:
        return f"{error.error}: {error.cause}" if error.cause else error.error, error.hint
    if (code := getattr(declaration, "code", "")) and (lacking := missing(code)):
        return f"the code of {known.word} {name!r} is {code}: {lacking}", "correct the path in its declaration"
    return None
