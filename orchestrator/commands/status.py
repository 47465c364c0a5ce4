"""`moegrid plan`, `status`, `logs`, `cancel`: what would happen, what happens, what was said."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.root import root_document
from orchestrator.store import ClaimState, records
from orchestrator.ui.console import columns, duration
from orchestrator.ui.live import Pace, Running, running

WATCH_SECONDS = 2.0
_ORDER = ("failed", "blocked", "running", "pending", "done")
_COLOURS = {"done": "green", "running": "blue", "failed": "red", "blocked": "red"}


def status(context: Context) -> int:
    """Show the state of every cell, once or again and again."""
    graph = context.load_graph()
    journal = Journal(context.store)
    document = root_document(graph)
    if context.arguments.json:
        context.emit(_data(context, graph, document))
    elif not context.arguments.watch:
        for line in _lines(context, graph, document, journal, Pace()):
            context.console.print(line)
    else:
        _watch(context, graph, document, journal)
    return EXIT_DONE


def _data(context: Context, graph: StageGraph, document: Mapping[str, object]) -> dict[str, Any]:
    """Return the contract of `status --json`."""
    from orchestrator.report.collect import collect

    results = collect(document, context.store)
    tried: dict[str, int] = {}
    for attempt in records.Submissions(context.store, graph.grid.name).attempts():
        for user in {user for stage in attempt.stages for user in graph.users.get(stage, ())}:
            tried[user] = tried.get(user, 0) + 1
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


def _watch(context: Context, graph: StageGraph, document: Mapping[str, object], journal: Journal) -> None:
    pace = Pace()
    if not context.console.is_terminal:
        while True:
            for line in _lines(context, graph, document, journal, pace):
                context.console.print(line)
            time.sleep(WATCH_SECONDS)
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

    with Live(console=RichConsole(file=context.console.stream), auto_refresh=False, screen=True) as live:
        while True:
            lines = _lines(context, graph, document, journal, pace, most=live.console.height)
            text = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)
            time.sleep(WATCH_SECONDS)
            if graph.grid.adaptive is not None:
                graph = context.load_graph()
                document = root_document(graph)


def _lines(
    context: Context,
    graph: StageGraph,
    document: Mapping[str, object],
    journal: Journal,
    pace: Pace,
    *,
    most: int = 0,
) -> list[str]:
    """Return summary, running jobs and cells; in at most `most` lines (0: any) those that need a look come first."""
    data = _data(context, graph, document)
    at_work = _at_work(context, graph, journal, pace)
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
            table[index] = table[index].replace(state, f"  {context.console.style(cell['state'], colour)}", 1)
    if len(shown) < len(states):
        table.append(f"... and {len(states) - len(shown)} more")
    return lines + table


def _at_work(context: Context, graph: StageGraph, journal: Journal, pace: Pace) -> list[Running]:
    missing = frozenset(graph.stages) - context.store.artifacts.keys()
    by_attempt: dict[str, list[str]] = {}
    claims: Mapping[str, ClaimState] = journal.claims(missing)
    for stage, claim in claims.items():
        if claim.live:
            by_attempt.setdefault(claim.attempt, []).append(stage)
    found = []
    for attempt, stages in by_attempt.items():
        handle = journal.handle(attempt)
        beat, site = journal.heartbeat(attempt), journal.site(attempt)
        found.append(running(graph, attempt, stages, beat, pace, site, handle.id if handle else ""))
    return found
