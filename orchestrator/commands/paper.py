"""`moegrid paper`: the papers' tables and figures from the store; with `--run` the grids of what is missing first."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.engine.forecast import forecast
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE, MoegridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.needs import missing_devices, missing_keys
from orchestrator.settings import load_site, module_environment, open_backend
from orchestrator.ui.console import Console, columns, duration, plural, wrapped

if TYPE_CHECKING:
    from orchestrator.report.paper import Shown

MOST_FILES = 3
FOLDER = "reports/paper"


@dataclass(frozen=True, slots=True)
class ToRun:
    """A grid whose results exhibits wait for: the words it is run with, and what a run would do."""

    grid: str
    words: tuple[str, ...]
    cells: int
    stages: int
    done: int
    seconds: float | None  # None: a scheduler takes its jobs


def paper(context: Context) -> int:
    """Make the papers' tables and figures from the store, and say what is missing and which command makes it.

    With `--run SCALE` the grids that make the missing ones are run first, one after another.
    """
    from orchestrator.report import paper as papers

    arguments, code = context.arguments, EXIT_DONE
    if arguments.run:
        code = _run_missing(context, papers.to_run(context.store))
        if code == EXIT_DETACHED:
            return code
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
    lines, width = [], Console(sys.stdout).width
    commands: dict[str, list[str]] = {}
    for item in shown:
        name = f"{item.exhibit.paper} {item.exhibit.name}"
        rest = len(item.files) - MOST_FILES
        made = ", ".join(item.files[:MOST_FILES]) + (f", {rest} more" if rest > 0 else "")
        lines += wrapped(f"{name:22} {made or 'missing: ' + item.reason}", width)
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


def _run_missing(context: Context, grids: Sequence[str]) -> int:
    """Say what is to run and how long it takes, then run grid after grid; return the worst exit code."""
    console, arguments = context.console, context.arguments
    planned = [_planned(context, grid) for grid in grids]
    if not planned:
        console.print("nothing to run: every exhibit that this project's grids and data make is made")
        return EXIT_DONE
    console.print(f"to run at scale {arguments.run}, one after another:")
    rows = [
        [
            one.grid,
            plural(one.cells, "cell"),
            f"{one.stages} of {plural(one.stages + one.done, 'stage')}",
            f"about {duration(one.seconds)}" if one.seconds is not None else "",
        ]
        for one in planned
    ]
    for line in columns(rows, width=max(0, console.width - 2)):
        console.print(f"  {line}")
    times = [one.seconds for one in planned if one.seconds is not None]
    if times:
        console.tell(
            f"together at most about {duration(sum(times))} (what several of them share is made once). "
            "Ctrl-C stops when running stages have saved their states; the same command goes on."
        )
    worst = EXIT_DONE
    for number, one in enumerate(planned, 1):
        words = [one.grid, *one.words, "--scale", arguments.run, *again.place_words(arguments)]
        console.print(f"\n{number} of {len(planned)}: {shlex.join(['moegrid', 'run', *words])}")
        code, stopped = _run(words)
        if stopped or code == EXIT_DETACHED:
            left = [later.grid for later in planned[number - 1 :]]
            output = ["--output", arguments.output] if arguments.output != FOLDER else []
            again_words = ["moegrid", "paper", "--run", arguments.run, *output, *again.place_words(arguments)]
            console.tell(f"stopped at {number} of {plural(len(planned), 'grid')}; left: {', '.join(left)}")
            console.print(f"go on with: {shlex.join(again_words)}")
            return EXIT_DETACHED
        worst = max(worst, code)
    return worst


def _planned(context: Context, grid: str) -> ToRun:
    """Plan a grid as a run of it would; raises MoegridError where it cannot run here."""
    from orchestrator.report.papers.declared import declared

    words = tuple(declared().words(grid))
    graph = build_graph(load_grid(grid, overrides=words, scale=context.arguments.run))
    budget = getattr(open_backend(load_site("local"), context.store.url), "budget", None)
    if graph.grid.runnable:
        raise MoegridError(
            f"grid {grid!r} cannot run at scale {context.arguments.run!r} on this machine",
            cause=graph.grid.runnable,
            hint=f"--run tiny here, or where there is what it asks for: moegrid run {shlex.join([grid, *words])}"
            f" --scale {context.arguments.run} --site slurm",
        )
    plan = context.plan(graph, Journal(context.store))
    if lacking := missing_keys(plan) or missing_devices(plan, budget.gpus if budget is not None else None):
        raise lacking
    seconds = forecast(plan, budget).makespan if budget is not None else None
    return ToRun(grid, words, len(graph.grid.cells), len(plan.pending), plan.counts()["done"], seconds)


def _run(words: Sequence[str]) -> tuple[int, bool]:
    """Run a grid in a process of its own; return its exit code, and whether this one was told to stop meanwhile."""
    with _passing_on() as signals:
        process = subprocess.Popen([sys.executable, "-m", "orchestrator", "run", *words], env=module_environment())
        signals.follow(process)
        code = process.wait()
    return (code if code >= 0 else 128 - code), bool(signals.got)


class _Signals:
    """The signals that came, which a run is told of: it ends by itself.

    A terminal sends Ctrl-C to both, all other signals come here alone. A second one ends running stages at once, so
    each must arrive once. What comes before the run is there waits for it.
    """

    def __init__(self) -> None:
        self.got: list[int] = []
        self._early: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        for number in self._early:
            process.send_signal(number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.got.append(number)
        if self._process is None:
            self._early.append(number)
        elif number != signal.SIGINT or not _in_foreground():
            self._process.send_signal(number)


@contextmanager
def _passing_on() -> Iterator[_Signals]:
    """Let a run hear of the signals that tell this process to stop, in place of ending here."""
    signals = _Signals()
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
