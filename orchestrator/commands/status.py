"""`moegrid status`: the state of every cell, once or as it changes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.engine.waiting import Wait
from orchestrator.errors import EXIT_DONE
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.root import root_document
from orchestrator.store import ClaimState, records
from orchestrator.ui.console import columns, duration
from orchestrator.ui.live import Pace, Running, running

if TYPE_CHECKING:
    from orchestrator.report.collect import Results

# Between two looks of a watch, seconds: while something happens, and at most.
WATCH_SECONDS = 2.0
LONGEST_SECONDS = 15.0
RUNNING = "running"
_ORDER = ("failed", "blocked", "running", "pending", "done")
_COLOURS = {"done": "green", "running": "blue", "failed": "red", "blocked": "red"}


@dataclass
class View:
    """What a watch keeps between two looks, so that it reads what is new alone."""

    context: Context
    graph: StageGraph
    document: Mapping[str, object]
    journal: Journal
    submissions: records.Submissions
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def open(cls, context: Context) -> View:
        """Load the grid that the arguments name."""
        graph = context.load_graph()
        submissions = records.Submissions(context.store, graph.grid.name)
        return cls(context, graph, root_document(graph), Journal(context.store), submissions)

    def reload(self) -> None:
        """Load the grid again, whose results may have asked for more seeds."""
        self.graph = self.context.load_graph()
        self.document = root_document(self.graph)


def status(context: Context) -> int:
    """Show the state of every cell, once or again and again."""
    view = View.open(context)
    if context.arguments.json:
        context.emit(_data(view, _collect(view)))
    elif not context.arguments.watch:
        for line in _lines(view, _collect(view)):
            context.console.print(line)
    else:
        _watch(view)
    return EXIT_DONE


def _collect(view: View) -> Results:
    from orchestrator.report.collect import collect

    return collect(view.document, view.context.store)


def _data(view: View, results: Results) -> dict[str, Any]:
    """Return the contract of `status --json`."""
    graph = view.graph
    # A cell is tried as often as the stage of its that was tried most: its stages are no attempts.
    tries = Counter(stage for attempt in view.submissions.attempts() for stage in attempt.stages)
    tried: dict[str, int] = {}
    for stage, count in tries.items():
        for user in graph.users.get(stage, ()):
            tried[user] = max(tried.get(user, 0), count)
    cells = []
    for cell in results.cells:
        metrics = dict(cell.metrics)
        last = max(cell.by_at, default=1.0)
        for at, values in cell.by_at.items():
            if at != last:
                metrics |= {f"{name}@{at:g}": value for name, value in values.items()}
        cells.append(
            {
                "id": cell.id,
                "name": cell.name,
                "factors": dict(cell.factors),
                "state": cell.state,
                "weights_sha256": cell.weights_sha256,
                "metrics": metrics,
                "attempts": tried.get(cell.id, 0),
                "reason": cell.reason,
            }
        )
    return {"grid": graph.grid.name, "scale": graph.grid.scale, "cells": cells}


def _watch(view: View) -> None:
    context, wait = view.context, Wait(WATCH_SECONDS, LONGEST_SECONDS)
    if not context.console.is_terminal:
        while True:
            began, results = time.monotonic(), _collect(view)
            for line in _lines(view, results):
                context.console.print(line)
            time.sleep(wait.next(_seen(results), time.monotonic() - began))
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

    with Live(console=RichConsole(file=context.console.stream), auto_refresh=False, screen=True) as live:
        while True:
            began, results = time.monotonic(), _collect(view)
            lines = _lines(view, results, most=live.console.height)
            text = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)
            time.sleep(wait.next(_seen(results), time.monotonic() - began))
            if view.graph.grid.adaptive is not None:
                view.reload()


def _seen(results: Results) -> tuple[object, ...]:
    """Return what tells that something happened; while a job works, something does."""
    states = Counter(cell.state for cell in results.cells)
    at_work = time.monotonic() if states[RUNNING] else 0.0
    return len(results.manifests), len(results.failures), states, at_work


def _lines(view: View, results: Results, *, most: int = 0) -> list[str]:
    """Return summary, running jobs and cells; in at most `most` lines (0: any) those that need a look come first."""
    graph, data = view.graph, _data(view, results)
    at_work = _at_work(view, results)
    states = [cell["state"] for cell in data["cells"]]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"{graph.grid.name} at scale {graph.grid.scale}: {summary}"]
    if at_work:
        head = ["running", "site", "step", "", "", "", "attempt", "job", "heartbeat"]
        body = [[*job.words(), job.attempt, job.job, f"{duration(job.age)} ago"] for job in at_work]
        lines += ["", *columns([head, *body])]
    lines.append("")
    shown, room = list(data["cells"]), most - len(lines) - 2
    if most and len(shown) > room:
        shown = sorted(shown, key=lambda cell: _ORDER.index(cell["state"]))[: max(1, room)]
    rows = [["cell", "state", "attempts", ""]]
    for cell in shown:
        rows.append([cell["name"], cell["state"], str(cell["attempts"]), cell["reason"]])
    table = columns(rows, right=(2,))
    for index, cell in enumerate(shown, start=1):
        colour = _COLOURS.get(cell["state"])
        if colour:
            state = f"  {cell['state']}"
            table[index] = table[index].replace(state, f"  {view.context.console.style(cell['state'], colour)}", 1)
    if len(shown) < len(states):
        table.append(f"... and {len(states) - len(shown)} more")
    return lines + table


def _at_work(view: View, results: Results) -> list[Running]:
    graph, journal = view.graph, view.journal
    missing = frozenset(graph.stages) - results.manifests.keys()
    by_attempt: dict[str, list[str]] = {}
    claims: Mapping[str, ClaimState] = journal.claims(missing)
    for stage, claim in claims.items():
        if claim.live:
            by_attempt.setdefault(claim.attempt, []).append(stage)
    found = []
    for attempt, stages in by_attempt.items():
        handle = journal.handle(attempt)
        beat, site = journal.heartbeat(attempt), journal.site(attempt)
        found.append(running(graph, attempt, stages, beat, view.pace, site, handle.id if handle else ""))
    return found
