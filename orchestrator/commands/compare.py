"""`moegrid compare`, `effects`, `paper`: grids against each other and against the papers; from the store alone."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE, MoegridError, did_you_mean, nearest
from orchestrator.grid.files import grid_names as own_grids
from orchestrator.store.records import grid_names
from orchestrator.ui.console import Console, plural

if TYPE_CHECKING:
    from orchestrator.report.paper import Shown

MOST_FILES = 3


def compare(context: Context) -> int:
    """Write the differences between two grids of the store, setting by setting, to stdout."""
    from orchestrator.report.collect import collect
    from orchestrator.report.formats import render
    from orchestrator.report.tables import grids

    arguments = context.arguments
    names = [Path(name).stem for name in (arguments.a, arguments.b)]
    _were_run(context, names)
    first, second = (collect(name, context.store) for name in names)
    width = Console(sys.stdout).width
    sys.stdout.write(render(grids(first, second), "json" if arguments.json else arguments.format, width))
    return EXIT_DONE


def effects(context: Context) -> int:
    """Write to stdout what each factor does over the cells of one or several grids of the store."""
    from orchestrator.report.collect import collect
    from orchestrator.report.effects import table
    from orchestrator.report.formats import render

    arguments = context.arguments
    names = list(dict.fromkeys(Path(name).stem for name in arguments.grids))
    _were_run(context, names)
    several = [collect(name, context.store) for name in names]
    scales = {str(results.document["scale"]): results.name for results in several}
    if len(scales) > 1:
        told = ", ".join(f"{name} at {scale}" for scale, name in scales.items())
        raise MoegridError(
            "grids of several scales have no effects in common", cause=told, hint="name grids of one scale"
        )
    known = list(dict.fromkeys(metric for results in several for metric in results.metrics))
    metrics = arguments.metric or list(dict.fromkeys(m for results in several for m in results.primary if m in known))
    for metric in metrics:
        if metric not in known:
            hint = did_you_mean(metric, known, "metrics")
            raise MoegridError(f"no cell of {', '.join(names)} has the metric {metric!r}", hint=hint)
    found = table(several, metrics)
    if found is None:
        cause = "it takes two levels of some factor, and more cells than levels and seeds"
        raise MoegridError(
            f"{', '.join(names)} tell no effects of factors", cause=cause, hint="run more seeds or cells"
        )
    sys.stdout.write(render(found, "json" if arguments.json else arguments.format, Console(sys.stdout).width))
    return EXIT_DONE


def _were_run(context: Context, names: Sequence[str]) -> None:
    """Raise MoegridError naming the grids of the store when one of `names` is none of them."""
    known = grid_names(context.store)
    for name in names:
        if name in known:
            continue
        hint = nearest(name, known)
        if not hint and name in own_grids():
            hint = f"run it first: moegrid run {name}"
        raise MoegridError(
            f"the store has no grid {name!r}",
            cause=f"grids that were run in {context.store.url}: {', '.join(known) or 'none'}",
            hint=hint or "this takes grids that were run in this store",
        )


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
