"""`moegrid status`: the state of every cell, once or as it changes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.engine.waiting import Wait
from orchestrator.errors import EXIT_DONE
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.root import root_cells
from orchestrator.store import ClaimState, records
from orchestrator.store.manifest import WEIGHTS
from orchestrator.ui.console import Console, columns, duration, table
from orchestrator.ui.live import Pace, Running, running

if TYPE_CHECKING:
    from orchestrator.report.collect import CellResult, View

# Between two looks of a watch, seconds: while something happens, and at most.
WATCH_SECONDS = 2.0
LONGEST_SECONDS = 15.0
RUNNING = "running"
_ORDER = ("failed", "blocked", "running", "pending", "done")
_COLOURS = {"done": "green", "running": "blue", "failed": "red", "blocked": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """A cell as its line tells it."""

    name: str
    state: str
    attempts: int
    reason: str


@dataclass
class Watched:
    """What is kept between two looks, so that a watch reads what is new alone: of a cell no more than its line."""

    context: Context
    graph: StageGraph
    journal: Journal
    submissions: records.Submissions
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def open(cls, context: Context) -> Watched:
        """Load the grid that the arguments name."""
        graph = context.load_graph()
        context.store.index.keep_only([WEIGHTS])
        return cls(context, graph, Journal(context.store), records.Submissions(context.store, graph.grid.name))

    def look(self) -> View:
        """Return what the store holds of the grid now."""
        from orchestrator.report.collect import look

        return look(set(self.graph.stages), self.context.store)

    def cells(self, view: View) -> Iterator[tuple[CellResult, int]]:
        """Yield each cell as a look shows it, and how often it was tried."""
        from orchestrator.report.collect import Naming, cell_result

        graph, tried, sections = self.graph, self._tried(), dict[str, object]()
        naming = Naming(lambda key: graph.stages[key].label, lambda key: len(graph.users[key]) > 1, graph.grid.seed)
        for entry in root_cells(graph, sections):
            cell = cell_result(records.with_own_sections(entry, sections), view, naming)
            yield cell, tried.get(cell.id, 0)

    def rows(self, view: View) -> list[Row]:
        """Return the lines of all cells."""
        return [Row(cell.name, cell.state, tries, cell.reason) for cell, tries in self.cells(view)]

    def _tried(self) -> dict[str, int]:
        """Return cell -> attempts. It is tried as often as the stage of its that was tried most."""
        tries = Counter(stage for attempt in self.submissions.attempts() for stage in attempt.stages)
        tried: dict[str, int] = {}
        for stage, count in tries.items():
            for user in self.graph.users.get(stage, ()):
                tried[user] = max(tried.get(user, 0), count)
        return tried


def status(context: Context) -> int:
    """Show the state of every cell, once or again and again."""
    watched = Watched.open(context)
    if context.arguments.json:
        grid = watched.graph.grid
        cells = (_record(cell, tries) for cell, tries in watched.cells(watched.look()))
        context.emit_listed({"grid": grid.name, "scale": grid.scale}, "cells", cells)
    elif not context.arguments.watch:
        view = watched.look()
        for line in _lines(watched, view, watched.rows(view)):
            context.console.print(line)
    else:
        _watch(watched)
    return EXIT_DONE


def _record(cell: CellResult, tries: int) -> dict[str, object]:
    """Return a cell as the contract of `status --json` has it."""
    metrics = dict(cell.metrics)
    last = max(cell.by_at, default=1.0)
    for at, values in cell.by_at.items():
        if at != last:
            metrics |= {f"{name}@{at:g}": value for name, value in values.items()}
    return {
        "id": cell.id,
        "name": cell.name,
        "factors": dict(cell.factors),
        "state": cell.state,
        "weights_sha256": cell.weights_sha256,
        "metrics": metrics,
        "attempts": tries,
        "reason": cell.reason,
    }


def _watch(watched: Watched) -> None:
    context, wait = watched.context, Wait(WATCH_SECONDS, LONGEST_SECONDS)
    if not context.console.is_terminal:
        while True:
            began, view = time.monotonic(), watched.look()
            rows = watched.rows(view)
            for line in _lines(watched, view, rows):
                context.console.print(line)
            time.sleep(wait.next(_seen(view, rows), time.monotonic() - began))
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

    with Live(console=RichConsole(file=context.console.stream), auto_refresh=False, screen=True) as live:
        while True:
            began, view = time.monotonic(), watched.look()
            rows = watched.rows(view)
            lines = _lines(watched, view, rows, most=live.console.height)
            text = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)
            time.sleep(wait.next(_seen(view, rows), time.monotonic() - began))
            if watched.graph.grid.adaptive is not None:
                watched.graph = context.load_graph()  # its results may have asked for more seeds


def _seen(view: View, rows: Sequence[Row]) -> tuple[object, ...]:
    """Return what tells that something happened; while a job works, something does."""
    states = Counter(row.state for row in rows)
    at_work = time.monotonic() if states[RUNNING] else 0.0
    return len(view.manifests), len(view.failures), states, at_work


def _lines(watched: Watched, view: View, rows: Sequence[Row], *, most: int = 0) -> list[str]:
    """Return summary, running jobs and cells; in at most `most` lines (0: any) those that need a look come first."""
    grid, at_work = watched.graph.grid, _at_work(watched, view)
    states = Counter(row.state for row in rows)
    summary = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [f"{grid.name} at scale {grid.scale}: {summary}"]
    console = watched.context.console
    if at_work:
        names = ["running", "site", "step", "", "", "", "attempt", "job", "heartbeat"]
        body = [[*job.words(), job.attempt, job.job, f"{duration(job.age)} ago"] for job in at_work]
        lines += ["", *columns([names, *body], width=console.width)]
    told = [["cell", "state", "attempts", ""]]
    told += [[row.name, _coloured(console, row.state), str(row.attempts), row.reason] for row in rows]
    head, *cells = table(told, right=(2,), width=console.width)
    lines += ["", *head]
    room = most - len(lines)
    if not most or sum(map(len, cells)) < room:
        return [*lines, *(line for cell in cells for line in cell)]
    shown = 0
    for _, cell in sorted(zip(rows, cells, strict=True), key=lambda pair: _ORDER.index(pair[0].state)):
        if shown and len(cell) >= room:
            break
        lines += cell
        room, shown = room - len(cell), shown + 1
    return [*lines, f"... and {len(rows) - shown} more"] if shown < len(rows) else lines


def _coloured(console: Console, state: str) -> str:
    return console.style(state, _COLOURS[state]) if state in _COLOURS else state


def _at_work(watched: Watched, view: View) -> list[Running]:
    graph, journal = watched.graph, watched.journal
    missing = frozenset(graph.stages) - view.manifests.keys()
    by_attempt: dict[str, list[str]] = {}
    claims: Mapping[str, ClaimState] = journal.claims(missing)
    for stage, claim in claims.items():
        if claim.live:
            by_attempt.setdefault(claim.attempt, []).append(stage)
    found = []
    for attempt, stages in by_attempt.items():
        handle = journal.handle(attempt)
        beat, site = journal.heartbeat(attempt), journal.site(attempt)
        found.append(running(graph, attempt, stages, beat, watched.pace, site, handle.id if handle else ""))
    return found
