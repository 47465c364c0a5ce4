"""Commands as one can type them where one stands: texts say `moegrid`, which need not be on the PATH."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

_COMMANDS = (
    *("plan", "run", "resume", "tick", "status", "logs", "explain", "diff", "cancel", "report", "table", "export"),
    *("compare", "effects", "paper", "sync", "gc", "doctor", "schema", "ui", "init", "dashboard", "new", "import"),
)
_NAMED = re.compile(rf"(?<![\w/.'-])moegrid(?= (?:{'|'.join(_COMMANDS)})\b)")


def program(here: Path | None = None) -> str:
    """Return how this program is started from the folder `here`, by default the working directory, quoted for a shell.

    `moegrid` where the PATH leads to the one that runs, else its path; `PYTHON -m orchestrator` if it was started so.
    """
    started = Path(sys.argv[0] or "moegrid")
    if started.parts[-2:] == ("orchestrator", "__main__.py"):
        return f"{shlex.quote(_shown(Path(sys.executable), here))} -m orchestrator"
    if started.name != "moegrid":
        return "moegrid"  # a part of another program
    found = shutil.which("moegrid")
    if found and os.path.exists(started) and os.path.samefile(found, started):
        return "moegrid"
    return shlex.quote(_shown(Path(os.path.abspath(started)), here))


def as_typed(text: str, here: Path | None = None) -> str:
    """Return a text for people with the commands in it as they can be typed in the folder `here`."""
    return _NAMED.sub(program(here).replace("\\", r"\\"), text) if "moegrid " in text else text


def _shown(path: Path, here: Path | None) -> str:
    """Return a path relative to the folder where it lies inside."""
    here = (here or Path.cwd()).resolve()
    if not path.is_relative_to(here):
        return str(path)
    inside = str(path.relative_to(here))
    return inside if os.sep in inside else f".{os.sep}{inside}"  # a shell seeks a plain name on the PATH
