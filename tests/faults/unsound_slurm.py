"""SLURM's commands, some of whose calls go wrong as a test says: a folder to put first on the PATH.

A plan is a list of words per command, one for each call, `ok` when it is used up: `nothing` prints nothing, `garbage`
prints garbage, `heading` the first line alone, `words` fails with words that nobody knows, `silent` does the work and
fails without a word, `lost` does the work and prints nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

_COMMAND = """#!/bin/bash
exec 9>"{folder}/{name}.lock"; flock 9
plan="{folder}/{name}.plan"
word=$(head -n 1 "$plan"); sed -i 1d "$plan"
echo "${{word:-ok}} $*" >>"{folder}/{name}.calls"
exec 9>&-
case ${{word:-ok}} in
    ok) exec {real} "$@" ;;
    nothing) exit 0 ;;
    garbage) head -c 300 /dev/urandom; exit 0 ;;
    heading) {real} "$@" | head -n 1; exit 0 ;;
    words) echo "{name}: error: the flux capacitor is exhausted" >&2; exit 1 ;;
    silent) {real} "$@" >/dev/null 2>&1; exit 1 ;;
    lost) {real} "$@" >/dev/null 2>&1; exit 0 ;;
esac
"""


def unsound(folder: Path, plans: Mapping[str, Sequence[str]]) -> Path:
    """Write the commands into `folder` and return it."""
    folder.mkdir(parents=True)
    for name, words in plans.items():
        (folder / f"{name}.plan").write_text("".join(f"{word}\n" for word in words))
        path = folder / name
        path.write_text(_COMMAND.format(folder=folder, name=name, real=shutil.which(name)))
        path.chmod(0o755)
    return folder


def calls(folder: Path, name: str) -> list[str]:
    """Return how a command was called: the word of the plan, then its arguments."""
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []
