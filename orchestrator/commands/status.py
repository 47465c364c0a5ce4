"""`moegrid plan`, `status`, `logs`, `cancel`: what would happen, what happens, what was said."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.backends.base import Backend, Handle
from orchestrator.commands import again
from orchestrator.commands.context import Context, cell_ids, take_cell
from orchestrator.commands.sites import backend_of
from orchestrator.engine.driver import batch_of, driver_of, is_alive
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, EXIT_PENDING, MoegridError
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.needs import missing_devices, missing_keys
from orchestrator.plan.root import root_document
from orchestrator.plan.summary import to_json
from orchestrator.spec.identity import plain
from orchestrator.store import ClaimState, records
from orchestrator.ui.console import columns, duration
from orchestrator.ui.live import Pace, Running, running

WATCH_SECONDS = 2.0
_ATTEMPT = re.compile(r"\d{12}[0-9a-f]{6}-\d+-\d+")
_ORDER = ("failed", "blocked", "running", "pending", "done")
_COLOURS = {"done": "green", "running": "blue", "failed": "red", "blocked": "red"}


def plan(context: Context) -> int:
    """Show what a run would do; with --exit-code say by 4 that something is to do."""
    from orchestrator.ui.plan_view import show_plan

    gpus = context.gpus()  # a site that does not exist is a mistake also where nothing runs yet
    graph = context.load_graph()
    result = context.plan(graph, Journal(context.store))
    if context.arguments.json:
        seeds = {"adaptive": [{**plain(s), "state": s.state} for s in context.seeds]} if graph.grid.adaptive else {}
        lacking = [error for error in (missing_keys(result), missing_devices(result, gpus)) if error]
        told = [{"error": error.error, "cause": error.cause, "hint": error.hint} for error in lacking]
        context.emit({**to_json(result), **seeds, "lacking": told})
    else:
        from orchestrator.backends.host import cores

        show_plan(result, context.console, parallel=cores(), gpus=gpus, adaptive=context.told_seeds(graph))
        if graph.grid.runnable:
            context.console.print(f"  this scale does not run on site 'local': {graph.grid.runnable}")
    return EXIT_PENDING if context.arguments.exit_code and not result.settled else EXIT_DONE


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


def logs(context: Context) -> int:
    """Print the log of the newest attempt at a cell or stage; with --rank that of one process, with -f as it grows."""
    wanted_name = take_cell(context.arguments)
    graph = context.load_graph()
    journal = Journal(context.store)
    attempts = records.Submissions(context.store, graph.grid.name).attempts()
    wanted = _stages(graph, wanted_name)
    chosen = [a for a in attempts if a.id == wanted_name or wanted & set(a.stages)]
    if not chosen:
        raise MoegridError(
            f"there is no attempt at {wanted_name or 'any stage'} yet",
            hint=f"run it first: {again.command(context.arguments, 'run')}",
        )
    rank = context.arguments.rank
    # A cell's newest attempt may be an evaluation by one process: the newest one that has this rank is meant.
    attempt = next((a for a in reversed(chosen) if _ranks(journal, a.id) > (rank or 0)), chosen[-1])
    context.console.print(
        f"attempt {attempt.id} ({', '.join(graph.stages[s].label for s in attempt.stages if s in graph.stages)})"
    )
    backend = _log_backend(context, journal, attempt) if rank is None else None
    shown = ""
    while True:
        if rank is not None:
            text = _log_of_rank(context, attempt.id, rank)
        else:
            handle = journal.handle(attempt.id)
            text = journal.log(attempt.id, backend.log(handle) if backend and handle else None)
        # A long log is cut at its head, so what is new is what follows the last line shown.
        fresh = text[len(shown) :] if text.startswith(shown) else text
        print(fresh, end="", flush=True)
        shown = text
        if not context.arguments.follow or (not fresh and _ended(context, journal, attempt.id, attempt.stages)):
            return EXIT_DONE
        time.sleep(0.5)


def _log_backend(context: Context, journal: Journal, attempt: records.Attempt) -> Backend | None:
    """Return who has the attempt's output; None where it cannot be reached: what was shipped to the store is shown."""
    try:
        submission = journal.submission(attempt.batch) or {}
        return backend_of(submission, journal.handle(attempt.id), context.store.url, context.arguments.site)
    except MoegridError:
        return None


def _ranks(journal: Journal, attempt: str) -> int:
    job = journal.job(attempt)
    resources = job.get("resources", {}) if job else {}
    return int(resources.get("nodes", 1)) * int(resources.get("processes", 1))


def _log_of_rank(context: Context, attempt: str, rank: int) -> str:
    """Return what a rank has shipped to the store so far, "" before its first line when it is followed."""
    objects, folder = context.store.objects, f"attempts/{attempt}/log/"
    data = objects.get(f"{folder}{rank}.txt")
    if data is None and not context.arguments.follow:
        names = (entry.path.removeprefix(folder).removesuffix(".txt") for entry in objects.list(folder))
        known = sorted(int(name) for name in names if name.isdigit())
        raise MoegridError(
            f"attempt {attempt} has no log of rank {rank}",
            hint=f"ranks with a log: {', '.join(map(str, known)) or 'none yet'}",
        )
    return (data or b"").decode(errors="replace")


def cancel(context: Context) -> int:
    """Ask every driver of the grid to stop, and running jobs that have no driver to save their states."""
    from orchestrator.engine.loop import CANCEL_FOLDER

    graph = context.load_graph()
    journal = Journal(context.store)
    context.store.put_json(f"{CANCEL_FOLDER}/{graph.grid.name}.json", {"time": time.time()})
    missing = frozenset(graph.stages) - context.store.artifacts.keys()
    # A job that waits for its turn holds a lease that may have run out: it is asked too.
    claims = [claim for claim in journal.claims(missing).values() if claim.attempt and not claim.released]
    flying = {claim.attempt for claim in claims if claim.live}
    batches: dict[str, list[str]] = {}
    for attempt in sorted({claim.attempt for claim in claims}):
        if not is_alive(driver_of(attempt)):
            batches.setdefault(batch_of(attempt), []).append(attempt)
    unasked: list[MoegridError] = []
    for (site, _), (backend, handles) in _orphans(context, journal, batches, unasked).items():
        try:
            backend.cancel(handles, now=context.arguments.now)
            flying |= {handle.attempt for handle in handles}
        except MoegridError as error:
            context.console.print(f"jobs of site {site} could not be asked")
            unasked.append(error)
    resume = again.command(context.arguments, "resume")
    context.console.print(f"asked {len(flying)} jobs to save their states and stop; go on with: {resume}")
    for trouble in unasked:
        context.console.print(str(trouble))
    return max((trouble.exit_code for trouble in unasked), default=EXIT_DONE)


def _orphans(
    context: Context, journal: Journal, batches: Mapping[str, Sequence[str]], unasked: list[MoegridError]
) -> dict[tuple[str, str], tuple[Backend, list[Handle]]]:
    """Return the jobs of batches without a driver, by site; what cannot be found out goes to `unasked`."""
    found: dict[tuple[str, str], tuple[Backend, list[Handle]]] = {}
    for batch, attempts in batches.items():
        submission = journal.submission(batch) or {}
        handles = {attempt: journal.handle(attempt) for attempt in attempts}
        known = {attempt: handle for attempt, handle in handles.items() if handle is not None}
        place = (str(submission.get("site", "")), str(submission.get("site_file", "")))
        try:
            if place not in found:
                one = next(iter(known.values()), None)
                found[place] = (backend_of(submission, one, context.store.url, context.arguments.site), [])
            backend = found[place][0]
            if len(known) < len(attempts):  # their driver died before it could write down what they are called
                known = {**backend.find(batch), **known}
        except MoegridError as error:
            unasked.append(error)
        if place in found:
            found[place][1].extend(known[attempt] for attempt in attempts if attempt in known)
    return found


def _stages(graph: StageGraph, name: str) -> set[str]:
    if not name:
        return set(graph.stages)
    by_key = {key for key in graph.stages if len(name) >= 6 and key.startswith(name)}
    if by_key or _ATTEMPT.fullmatch(name):
        return by_key
    return {stage for cell in cell_ids(graph, name) for stage in graph.cells[cell].keys if len(graph.users[stage]) == 1}


def _ended(context: Context, journal: Journal, attempt: str, stages: tuple[str, ...]) -> bool:
    states = journal.claims(set(stages))
    return not any(claim.live and claim.attempt == attempt for claim in states.values())


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
