"""Print what nothing in the product calls, and fail when there is something: vulture, with [tool.vulture]'s exceptions.

    python infra/dead_code.py

The code that a declaration names by its dotted path ("jobs.moe.routers:Router") counts as called.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CODE = re.compile(r'"(?:orchestrator|jobs|moegrid)[\w.]*:(\w+)(?:\.(\w+))?"')


def declared(paths: list[str]) -> set[str]:
    """Return the names of functions and classes that are named by a dotted path somewhere below `paths`."""
    texts = [path.read_text("utf-8") for folder in paths for path in (ROOT / folder).rglob("*.py")]
    return {name for text in texts for found in _CODE.findall(text) for name in found if name}


def main() -> int:
    """Run vulture and return its exit code."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["vulture"]
    names = sorted({*settings["ignore_names"], *declared(settings["paths"])})
    command = [sys.executable, "-m", "vulture", "--ignore-names", ",".join(names), *settings["paths"]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
