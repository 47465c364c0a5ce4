"""`moegrid compare`, `paper`: grids against each other, and against the papers; from the store alone."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE
from orchestrator.ui.console import plural

if TYPE_CHECKING:
    from orchestrator.report.paper import Shown

MOST_FILES = 3


def compare(context: Context) -> int:
    """Write the differences between two grids of the store, setting by setting, to stdout."""
    from orchestrator.report.collect import collect
    from orchestrator.report.formats import render
    from orchestrator.report.tables import grids

    arguments = context.arguments
    first, second = (collect(Path(name).stem, context.store) for name in (arguments.a, arguments.b))
    sys.stdout.write(render(grids(first, second), "json" if arguments.json else arguments.format))
    return EXIT_DONE


def paper(context: Context) -> int:
    """Make the papers' tables and figures from the store, and say what is missing and which command makes it.

    With `--run SCALE` the grids that make the missing ones are run first, one after another.
    """
    from orchestrator.report import paper as papers

    arguments, code = context.arguments, EXIT_DONE
    if arguments.run:
        code = _run_missing(context, papers.to_run(context.store))
        context = Context.open(arguments)
    folder = Path(arguments.output)
    shown = papers.write(context.store, folder)
    if arguments.json:
        context.emit([_record(item) for item in shown])
        return code
    sys.stdout.write("\n".join(_lines(shown, folder)) + "\n")
    return code


def _lines(shown: Sequence[Shown], folder: Path) -> list[str]:
    """Return what became of every exhibit, then the commands that make the missing ones."""
    lines = []
    commands: dict[str, list[str]] = {}
    for item in shown:
        name = f"{item.exhibit.paper} {item.exhibit.name}"
        rest = len(item.files) - MOST_FILES
        made = ", ".join(item.files[:MOST_FILES]) + (f", {rest} more" if rest > 0 else "")
        lines.append(f"{name:22} {made or 'missing: ' + item.reason}")
        if item.command:
            commands.setdefault(item.command, []).append(name)
    if commands:
        lines += ["", "what is missing is made by:"]
        lines += [f"  {command}   ({plural(len(names), 'exhibit')})" for command, names in commands.items()]
    made_of = sum(bool(item.files) for item in shown)
    return [*lines, "", f"{made_of} of {len(shown)} made" + (f": {folder / 'index.html'}" if made_of else "")]


def _record(item: Shown) -> dict[str, object]:
    exhibit = item.exhibit
    return {
        "paper": exhibit.paper,
        "name": exhibit.name,
        "shows": exhibit.shows,
        "grid": exhibit.grid,
        "type": exhibit.kind,
        "path": item.path,
        "files": list(item.files),
        "notes": list(item.notes),
        "missing": item.reason,
        "command": item.command,
    }


def _run_missing(context: Context, grids: list[str]) -> int:
    """Run grids one after another, each in a process of its own; return the worst exit code."""
    from orchestrator.report.papers.declared import declared

    worst = EXIT_DONE
    for number, grid in enumerate(grids, 1):
        words = [grid, *declared().words(grid), "--scale", context.arguments.run, *again.place_words(context.arguments)]
        context.console.print(f"{number} of {len(grids)}: {shlex.join(['moegrid', 'run', *words])}")
        code = subprocess.run([sys.executable, "-m", "orchestrator", "run", *words], check=False).returncode
        if code == EXIT_DETACHED:
            raise KeyboardInterrupt
        worst = max(worst, code)
    return worst
