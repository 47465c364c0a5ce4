"""Which file a grid's name means, and how paths are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from orchestrator import resources
from orchestrator.errors import GridError, Problem, did_you_mean

GRIDS = resources.project("grids")
COMMAND_LINE = "command line"
# No name ends in .json: `searches/NAME/` would be a folder and, as the record of another grid, an object as well.
NAME = re.compile(r"^(?!.*\.json$)[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")


def find_grid(name_or_path: str) -> Path:
    """Return the file of a grid given by name (`quickstart`) or by path. Raises GridError."""
    given = Path(name_or_path)
    if given.suffix in (".yaml", ".yml") or os.sep in name_or_path:
        if given.is_file():
            return given.resolve()
        what = "is no file" if given.exists() else "does not exist"
        raise GridError([Problem(f"grid file {name_or_path!r} {what}", hint=_known(given.stem))])
    found = resources.find("grid", name_or_path)
    if found is None:
        raise GridError([Problem(f"grid {name_or_path!r} does not exist", hint=_known(name_or_path))])
    return found.resolve()


def grid_names() -> tuple[str, ...]:
    """Return the names of the grids that come with the project."""
    return tuple(sorted(path.stem for path in GRIDS.glob("*.yaml")))


def _known(name: str) -> str:
    return did_you_mean(name, sorted(resources.files("grid")))
