"""Everything that has a name is a declaration in one registry, whether it is ours or another package's.

A declaration is a frozen dataclass with a `name`: plain data that the control plane reads, with the dotted path of its
code, which only a node imports. Built-in names come first. Entry points of the group `moegrid.<group>` are looked at
only when a name is not ours (a scan takes about 0.1 s), and files that a grid names under `plugins:` are registered
when the grid is read. A declaration from outside carries its origin into the keys of the stages that use it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from orchestrator.errors import MoegridError, did_you_mean

PREFIX = "moegrid."


class Declaration(Protocol):
    """What every kind of declaration has. A kind may also have `version: int`, raised when its meaning changes."""

    @property
    def name(self) -> str: ...


D = TypeVar("D", bound=Declaration)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who provides a declaration: a distribution and its version, or a plugin file and the digest of its content."""

    provider: str
    version: str
    file: bool = False

    def __str__(self) -> str:
        return f"{self.provider} {self.version[:12] if self.file else self.version}"

    def identity(self, declaration: object) -> str:
        """Return what stands for the declaration's meaning in a key: a file by its content, a kind by its version."""
        if self.file:
            return f"sha256:{self.version}"
        return f"{self.provider}:{getattr(declaration, 'version', 1)}"


@dataclass(frozen=True, slots=True)
class Provided(Generic[D]):
    """A declaration from outside and who provides it."""

    declaration: D
    origin: Origin


@dataclass
class Registry(Generic[D]):
    """All declarations of one kind.

    `group` is the last part of the entry points' group, `kind` the class of a declaration, `word` what one is called in
    messages and keys ("preset", "loss"), `builtins` ours by name, in the order in which they are shown. `brought_by`
    says whose plugin files may declare one: a grid's, a site's, or "" for packages alone, because `why`.
    """

    group: str
    word: str
    kind: type[D]
    builtins: Mapping[str, D]
    brought_by: str = "grid"
    why: str = ""
    outside: dict[str, Provided[D]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        REGISTRIES[self.group] = _BY_WORD[self.word] = self

    def __contains__(self, name: object) -> bool:
        return name in self.builtins or (isinstance(name, str) and self.find(name) is not None)

    def get(self, name: str) -> D:
        """Return a declaration; MoegridError with the nearest names when nobody provides it."""
        found = self.find(name)
        if found is None:
            raise MoegridError(f"{self.word} {name!r} is unknown", hint=self.hint(name))
        return found

    def find(self, name: str) -> D | None:
        """Return a declaration, None when nobody provides it; MoegridError when two do or its package is broken."""
        if (ours := self.builtins.get(name)) is not None:
            return ours
        if name not in self.outside and name in _names_of_packages(self.group):
            self.outside[name] = self._load(name)
        return self.outside[name].declaration if name in self.outside else None

    def hint(self, name: str) -> str:
        """Return the nearest name that there is, or all of them."""
        return did_you_mean(name, self.names(), f"known {self.group}")

    def near(self, name: str) -> str:
        """Return the nearest name that there is, "" when none is near."""
        hint = self.hint(name)
        return hint if hint.startswith("did you mean") else ""

    def names(self) -> tuple[str, ...]:
        """Return all names, ours first: those of installed packages are looked for."""
        return tuple(dict.fromkeys((*self.builtins, *self.outside, *_names_of_packages(self.group))))

    def origin(self, name: str) -> Origin | None:
        """Return who provides a name, None for ours and for what has not been asked for."""
        return self.outside[name].origin if name in self.outside else None

    def who(self, name: str) -> str:
        """Return a name with its provider, for messages."""
        origin = self.origin(name)
        return f"{self.word} {name!r}" + (f" of {origin}" if origin else "")

    def identity(self, name: str) -> str | None:
        """Return what a key holds of a declaration from outside, None for ours."""
        if name in self.builtins or self.find(name) is None:
            return None
        provided = self.outside[name]
        return provided.origin.identity(provided.declaration)

    def register(self, declaration: D, origin: Origin) -> None:
        """Add a declaration of a plugin file; another provider of the same name is an error.

        A file that changed replaces what it declared before (`forget`).
        """
        name = declaration.name
        if not isinstance(declaration, self.kind):
            raise MoegridError(f"{origin}: {name!r} is no {self.kind.__name__}")
        self._check(declaration, origin)
        if name in self.builtins:
            raise MoegridError(
                f"{self.word} {name!r} of {origin.provider} is taken: moegrid has one of that name",
                hint="give it another name",
            )
        others = [
            *(_distribution(entry) for entry in _names_of_packages(self.group).get(name, ())),
            *([self.outside[name].origin] if name in self.outside else []),
        ]
        if others and (name not in self.outside or self.outside[name].origin.provider != origin.provider):
            raise _doubled(self.word, name, [origin, *others])
        self.outside[name] = Provided(declaration, origin)

    def forget(self, changed: Origin) -> None:
        """Drop what a plugin file declared before its content changed."""
        for name, provided in list(self.outside.items()):
            old = provided.origin
            if old.file and old.provider == changed.provider and old.version != changed.version:
                del self.outside[name]

    def _load(self, name: str) -> Provided[D]:
        entries = _names_of_packages(self.group)[name]
        if len(entries) > 1:
            raise _doubled(self.word, name, [_distribution(entry) for entry in entries])
        (entry,) = entries
        origin = _distribution(entry)
        try:
            declaration = entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise MoegridError(
                f"{self.word} {name!r} cannot be loaded from {origin}",
                cause=f"{entry.value}: {type(error).__name__}: {error}",
                hint=f"mend or update {origin.provider}, or uninstall it",
            ) from error
        if not isinstance(declaration, self.kind) or declaration.name != name:
            raise MoegridError(
                f"{self.word} {name!r} of {origin} is not declared as one",
                cause=f"{entry.value} is {_shown(declaration)}",
                hint=f"the entry point names a {self.kind.__name__} whose name is {name!r}",
            )
        self._check(declaration, origin)
        return Provided(declaration, origin)

    def _check(self, declaration: D, origin: Origin) -> None:
        """Raise MoegridError when a declaration's parameters cannot be filled in from a grid."""
        owner = getattr(declaration, "parameters", None)
        if owner is None:
            return
        who = f"the parameters of {self.word} {declaration.name!r} of {origin}"
        if not isinstance(owner, type) or not dataclasses.is_dataclass(owner):
            raise MoegridError(f"{who} are no dataclass", hint="name a class with @dataclass(frozen=True)")
        if not owner.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise MoegridError(f"{who} can be changed", hint=f"write @dataclass(frozen=True) over {owner.__name__}")
        nothing = dataclasses.MISSING
        for one in dataclasses.fields(owner):
            if one.default is nothing and one.default_factory is nothing:
                hint = f"write {one.name}: {getattr(one.type, '__name__', one.type)} = ... in {owner.__name__}"
                raise MoegridError(f"{who} have no default for {one.name!r}", hint=hint)


REGISTRIES: dict[str, Registry[Any]] = {}
_BY_WORD: dict[str, Registry[Any]] = {}


def registry_of(declaration: object) -> Registry[Any] | None:
    """Return the registry that a declaration belongs to by its class, None when it is no declaration."""
    return next((registry for registry in REGISTRIES.values() if isinstance(declaration, registry.kind)), None)


def ours(named: str) -> bool:
    """Return whether "WORD NAME" is one of ours, which no package and no file can change."""
    word, _, name = named.partition(" ")
    registry = _BY_WORD.get(word)
    return registry is not None and name in registry.builtins


def identity(named: str) -> str | None:
    """Return what a key holds of "WORD NAME" ("preset noisy"), None when it is ours or no declaration."""
    word, _, name = named.partition(" ")
    registry = _BY_WORD.get(word)
    return registry.identity(name) if registry is not None and " " not in name else None


def provided(named: str) -> tuple[str, str, Origin] | None:
    """Return (group, name, who provides it) of "WORD NAME" ("preset noisy"), None when it is ours or no declaration."""
    word, _, name = named.partition(" ")
    registry = _BY_WORD.get(word)
    if registry is None or " " in name or registry.find(name) is None:
        return None
    origin = registry.origin(name)
    return None if origin is None else (registry.group, name, origin)


def declaration(named: str) -> Any:
    """Return the declaration "WORD NAME" ("preset noisy"); MoegridError when there is none."""
    word, _, name = named.partition(" ")
    if (registry := _BY_WORD.get(word)) is None:
        raise MoegridError(f"{word!r} is no kind of declaration", hint=did_you_mean(word, _BY_WORD, "kinds"))
    return registry.get(name)


def anything_outside() -> bool:
    """Return whether a declaration from outside was asked for, or registered, so far."""
    return any(registry.outside for registry in REGISTRIES.values())


def in_use() -> Iterator[tuple[str, str, Origin]]:
    """Yield (word, name, origin) of every declaration from outside that was asked for so far."""
    for registry in REGISTRIES.values():
        for name, provided in registry.outside.items():
            yield registry.word, name, provided.origin


def file_of(path: str, who: str) -> Path:
    """Return a file or folder of a package, "package:inner/path", without importing it; MoegridError when missing."""
    module, _, inner = path.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    found = Path(spec.origin).parent / inner if spec is not None and spec.origin else None
    if found is None or not found.exists():
        raise MoegridError(
            f"{path} of {who} is missing",
            cause=f"{found or module} does not exist",
            hint="install the package that holds it on this machine as well",
        )
    return found


def load(path: str, who: str) -> Any:
    """Import the code of a declaration, "package.module:name"; MoegridError that says whose it is."""
    module, _, attribute = path.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise MoegridError(
            f"the code of {who} cannot be imported: {path}",
            cause=f"{type(error).__name__}: {error}",
            hint=_remedy(module, error),
        ) from error


def _remedy(module: str, error: ImportError | AttributeError) -> str:
    lacking = error.name if isinstance(error, ModuleNotFoundError) else None
    if lacking and not f"{module}.".startswith(f"{lacking}."):
        return f"{module} imports {lacking}: install it on this machine as well"
    if lacking:
        return "install the package that holds it on this machine as well"
    return "correct the path in the declaration, or what it names"


def _shown(found: object) -> str:
    name = getattr(found, "name", None)
    return f"a {type(found).__name__}" + (f" named {name!r}" if isinstance(name, str) else "")


def missing(path: str) -> str:
    """Return what is not there of "package.module:name", "" as far as can be told without importing that module."""
    module, _, attribute = path.partition(":")
    if (loaded := sys.modules.get(module)) is not None:
        try:
            functools.reduce(getattr, attribute.split("."), loaded)
        except AttributeError:
            return f"{module} has no {attribute}"
        return ""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return "" if found else f"there is no module {module}"


@functools.cache
def _names_of_packages(group: str) -> Mapping[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """Return name -> entry points of a group in all installed packages: the scan."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=PREFIX + group):
        # A package that lies on the path twice is one provider.
        entries = found.setdefault(entry.name, [])
        if all((other.value, _distribution(other)) != (entry.value, _distribution(entry)) for other in entries):
            entries.append(entry)
    return {name: tuple(entries) for name, entries in found.items()}


def _distribution(entry: importlib.metadata.EntryPoint) -> Origin:
    return Origin(entry.dist.name, entry.dist.version) if entry.dist else Origin(entry.value, "")


def _doubled(word: str, name: str, origins: list[Origin]) -> MoegridError:
    files = [origin.provider for origin in origins if origin.file]
    packages = [origin.provider for origin in origins if not origin.file]
    rename = f"give it another name in {' or '.join(files)}"
    remove = f"uninstall {' or '.join(dict.fromkeys(packages))}"
    return MoegridError(
        f"{word} {name!r} is provided twice: {', '.join(map(str, origins))}",
        hint=", or ".join([rename] * bool(files) + [remove] * bool(packages)),
    )
