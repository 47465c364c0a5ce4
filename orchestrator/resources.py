"""Where grids, recipes, scales, sites and reference tables are looked for: the one place that knows.

A name is sought in the working directory, then in the folders of `MOEGRID_PATH` (separated as in PATH), then in what
comes with the project. In a clone that is the repository; in an installed distribution it is packed beside the code, in
the same layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH_VARIABLE = "MOEGRID_PATH"

# kind of resource -> (folders below a root that hold it, suffix)
_PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "grid": (("grids",), ".yaml"),
    "recipe": (("grids/recipes",), ".yaml"),
    "scale": (("grids/scales",), ".yaml"),
    "site": (("infra/sites", "sites"), ".yaml"),
}


def roots() -> tuple[Path, ...]:
    """Return the folders in which resources are looked for, nearest first."""
    named = [Path(part).expanduser() for part in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if part]
    return tuple(dict.fromkeys(path.resolve() for path in (Path.cwd(), *named, ROOT)))


def files(kind: str) -> dict[str, Path]:
    """Return every resource of a kind (`grid`, `recipe`, `scale`, `site`) by its name; the nearest one of a name."""
    found: dict[str, Path] = {}
    for path in _candidates(kind):
        found.setdefault(path.stem, path)
    return found


def find(kind: str, name: str) -> Path | None:
    """Return the file of one resource, None when there is none."""
    places, suffix = _PLACES[kind]
    for root in roots():
        for place in places:
            if (path := root / place / f"{name}{suffix}").is_file():
                return path
    return None


def project(path: str) -> Path:
    """Return a file or folder that comes with the project, by its path in the repository."""
    return ROOT / path


def _candidates(kind: str) -> Iterator[Path]:
    places, suffix = _PLACES[kind]
    for root in roots():
        for place in places:
            yield from sorted((root / place).glob(f"*{suffix}"))
