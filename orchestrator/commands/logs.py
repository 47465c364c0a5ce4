"""`moegrid logs`: what an attempt said."""

from __future__ import annotations

import re
import time

from orchestrator.backends.base import Backend
from orchestrator.commands import again
from orchestrator.commands.context import Context, cell_ids, take_cell
from orchestrator.commands.sites import backend_of
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.plan.graph import StageGraph
from orchestrator.store import records
from orchestrator.store.attempts import log_folder, log_path

_ATTEMPT = re.compile(r"\d{12}[0-9a-f]{6}-\d+-\d+")


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
        submission = journal.submission(attempt.batch)
        return backend_of(submission, journal.handle(attempt.id), context.store.url, context.arguments.site)
    except MoegridError:
        return None


def _ranks(journal: Journal, attempt: str) -> int:
    job = journal.job(attempt)
    return job.ranks if job else 1


def _log_of_rank(context: Context, attempt: str, rank: int) -> str:
    """Return what a rank has shipped to the store so far, "" before its first line when it is followed."""
    objects, folder = context.store.objects, log_folder(attempt)
    data = objects.get(log_path(attempt, rank))
    if data is None and not context.arguments.follow:
        names = (entry.path.removeprefix(folder).removesuffix(".txt") for entry in objects.list(folder))
        known = sorted(int(name) for name in names if name.isdigit())
        raise MoegridError(
            f"attempt {attempt} has no log of rank {rank}",
            hint=f"ranks with a log: {', '.join(map(str, known)) or 'none yet'}",
        )
    return (data or b"").decode(errors="replace")


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
