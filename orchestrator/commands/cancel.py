"""`moegrid cancel`: ask what runs to save its state and stop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from orchestrator.backends.base import Backend, Handle
from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.commands.sites import backend_of
from orchestrator.engine.driver import is_alive
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.store.attempts import batch_of, driver_of


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
        submission = journal.submission(batch)
        handles = {attempt: journal.handle(attempt) for attempt in attempts}
        known = {attempt: handle for attempt, handle in handles.items() if handle is not None}
        place = (submission.site, submission.site_file) if submission else ("", "")
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
