"""Where grids, recipes, scales, sites and reference tables are looked for: the one place that knows.

A name is sought in the working directory, then in the folders of `MOEGRID_PATH` (separated as in PATH), then in what
comes with the project, then in what installed packages bring (entry points `moegrid.grids`).
In a clone the project's root is the repository; in an installed distribution it is packed beside the code, laid out the
same.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from orchestrator import resources
from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PATH_VARIABLE = "MOEGRID_PATH"

# kind of resource -> (folders below a root that hold it, suffix)
_PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "grid": (("grids",), ".yaml"),
    "recipe": (("grids/recipes",), ".yaml"),
    "scale": (("grids/scales",), ".yaml"),
    "site": (("infra/sites", "sites"), ".yaml"),
}


@dataclass(frozen=True, slots=True)
class GridFolder:
    """Grids, recipes, scales and sites that a package brings: a folder in it, laid out as a working directory is.

    `package` is what holds it, `folder` its path there: `grids/*.yaml`, `grids/recipes`, `grids/scales`, `sites`.
    """

    name: str
    package: str
    folder: str = "."

    def root(self) -> Path:
        """Return the folder; MoegridError when the package is not there."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not (spec.submodule_search_locations or spec.origin):
            raise MoegridError(f"grids {self.name!r} name the package {self.package!r}, which is not installed")
        found = list(spec.submodule_search_locations or [])
        return Path(found[0] if found else Path(str(spec.origin)).parent) / self.folder


_NONE: Mapping[str, GridFolder] = MappingProxyType({})
FOLDERS = Registry("grids", "grids", GridFolder, _NONE, "", "grids, recipes and sites are sought before one is read")


def cache_root() -> Path:
    """Return the folder of what this machine may forget (MOEGRID_CACHE, else the user's cache directory)."""
    named = os.environ.get("MOEGRID_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moegrid"


def roots() -> tuple[Path, ...]:
    """Return the folders in which resources are looked for, nearest first."""
    named = [Path(part).expanduser() for part in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if part]
    return tuple(dict.fromkeys(path.resolve() for path in (Path.cwd(), *named, ROOT)))


def files(kind: str) -> dict[str, Path]:
    """Return every resource of a kind (`grid`, `recipe`, `scale`, `site`) by its name; the nearest one of a name."""
    found: dict[str, Path] = {}
    for root in (*roots(), *packages().values()):
        for path in _all_below(root, kind):
            found.setdefault(path.stem, path)
    return found


def find(kind: str, name: str) -> Path | None:
    """Return the file of one resource, None when there is none; MoegridError when two packages bring it.

    Packages are looked at last, and only for a name that is found nowhere else.
    """
    for root in roots():
        if (own := _below(root, kind, name)) is not None:
            return own
    brought = {provider: found for provider, root in packages().items() if (found := _below(root, kind, name))}
    if len(brought) > 1:
        raise MoegridError(
            f"{kind} {name!r} comes from two packages: {', '.join(brought)}",
            hint=f"write the path of one: {next(iter(brought.values()))}",
        )
    return next(iter(brought.values()), None)


def packages() -> dict[str, Path]:
    """Return the folders that installed packages bring, by package and version; what is broken is told and left out."""
    found = {}
    for name in FOLDERS.names():
        try:
            root = FOLDERS.get(name).root()
        except MoegridError as error:
            log.warning("%s", error)
            continue
        found[str(FOLDERS.origin(name))] = root
    return found


def project(path: str) -> Path:
    """Return a file or folder that comes with the project, by its path in the repository."""
    return ROOT / path


def _below(root: Path, kind: str, name: str) -> Path | None:
    """Return the file called `name` of a kind in a root."""
    places, suffix = _PLACES[kind]
    paths = (root / place / f"{name}{suffix}" for place in places if Path(name).name == name)
    return next((path for path in paths if path.is_file()), None)


def _all_below(root: Path, kind: str) -> list[Path]:
    places, suffix = _PLACES[kind]
    return [path for place in places for path in sorted((root / place).glob(f"*{suffix}"))]


def show(path: Path) -> str:
    """Return `path` relative to the project or the working directory where it lies inside, else in full."""
    for root in (resources.ROOT, Path.cwd()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)
