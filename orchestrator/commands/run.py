"""`moegrid run`, `resume` and `tick`: plan, show, drive the engine, report."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.backends import host
from orchestrator.backends.base import Backend
from orchestrator.catalog.gpus import gpu_of
from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.commands.live_report import LiveReport, live_report
from orchestrator.commands.results import show_results, try_report
from orchestrator.engine import driver
from orchestrator.engine.audit import heal
from orchestrator.engine.journal import Journal
from orchestrator.engine.loop import Engine, Options, Snapshot
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE, EXIT_FAILED, EXIT_UNREACHABLE, MoegridError
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.memory import memory_of, refused_memory
from orchestrator.plan.needs import missing_devices, missing_keys
from orchestrator.plan.plan import Plan, make_plan
from orchestrator.plan.root import root_document
from orchestrator.settings import load_site, module_environment, open_backend, require
from orchestrator.store.attempts import Failure
from orchestrator.ui.console import plural
from orchestrator.ui.live import Progress, stage_name
from orchestrator.ui.plan_view import show_plan
from orchestrator.ui.typed import as_typed

FINAL_SYNC_SECONDS = 120.0
TAIL_LINES = 8
MOST_CELLS_SHOWN = 500
# Kinds whose message and hint say it all; of the others the last lines of the log are shown.
EXPLAINED = frozenset(
    {
        "source",
        "source_away",
        "unreachable",
        "disk_full",
        "import",
        "numerics",
        "code",
        "nan",
        "diverged",
        "router_collapsed",
    }
)
UNREACHABLE = frozenset({"source_away", "unreachable", "disk_full"})


def run(context: Context) -> int:
    """Bring the grid to the end; return the exit code."""
    arguments, console = context.arguments, context.console
    graph = context.load_graph()
    if graph.grid.runnable and load_site(arguments.site).backend == "local":
        raise MoegridError(
            f"grid {graph.grid.name!r} cannot run at scale {graph.grid.scale!r} on site 'local'",
            cause=graph.grid.runnable,
            hint="moegrid plan shows it; run it with --site slurm, or take --scale tiny",
        )
    _refuse(context, graph)
    context.begin_writing()
    if graph.grid.search is not None:
        from orchestrator.commands.search import search

        return search(context, graph.grid.search, graph.grid.name)
    context.write_root(graph)
    audit = heal(context.store, graph, thorough=arguments.verify)
    for key, cause in audit.wrong.items():
        console.print(f"{console.style('repair', 'yellow')} {stage_name(graph, key)}: {cause}; it is made again")
    for key, owners in audit.waits.items():
        others = ", ".join(stage_name(graph, owner) for owner in sorted(owners))
        console.print(f"{console.style('repair', 'yellow')} {stage_name(graph, key)}: whole again with {others}")
    context.store.index.rebuild(audit.sound, audit.listed)
    if graph.stages.keys() <= audit.sound:
        return _nothing_to_do(context, graph)
    engine, backend = open_engine(context, graph)
    engine.begin(audit.waits)
    plan = context.plan(graph, engine.journal, engine.clock)
    _within_budget(plan, arguments)
    if lacking := missing_keys(plan):
        raise lacking
    show_plan(plan, console, budget=getattr(backend, "budget", None), adaptive=context.told_seeds(graph))
    if plan.settled and not plan.keys("blocked"):
        return _nothing_to_do(context, graph)
    if backend.name == "local":
        require("torch", "the site local trains and evaluates on this machine")
    if arguments.detach:
        return tick(context, engine, graph)
    results = None
    views: list[Progress] = []
    with (
        _sidecar(context, graph) as attachments,
        _ctrl_c(engine, as_typed(again.command(arguments, "resume")), views, detached=backend.name != "local"),
        live_report(again.grid_words(arguments), context.store.url, wanted=not arguments.no_report) as report,
    ):
        while True:
            with Progress(graph, console, engine.journal.heartbeat, engine.journal.site) as view:
                views[:] = [view]
                snapshot = engine.run(_observers(graph, view, report), view.trouble)
            more = None if engine.stopped else _more_seeds(context, graph)
            if more is None:
                break
            graph = more
            engine.extend(graph)
            plan = context.plan(graph, engine.journal, engine.clock)
            console.print(f"{plural(len(graph.grid.cells), 'cell')} now: {context.told_seeds(graph)}")
            _within_budget(plan, arguments)
        if report is not None:
            report.end()
        if not snapshot.plan.pending:
            results = _results(context, graph, attachments)
    return _conclude(context, graph, engine, snapshot.plan, results)


def _refuse(context: Context, graph: StageGraph) -> None:
    """Raise what a run of the grid would be refused for, before anything of it is written down."""
    budget, whole, limited = context.budget(), make_plan(graph, ()), _limited(context.arguments)
    gpus = budget.gpus if budget else None
    gpu = gpu_of(context.arguments.gpu) if context.arguments.gpu else None
    large = not context.arguments.force_memory and refused_memory(memory_of(graph), gpu) is not None
    if not (limited or large) and missing_keys(whole) is None and missing_devices(whole, gpus) is None:
        return
    plan = context.plan(graph, Journal(context.store))
    _within_budget(plan, context.arguments)
    if lacking := missing_keys(plan) or missing_devices(plan, gpus):
        raise lacking
    if large and (refused := refused_memory(memory_of(graph, frozenset(plan.pending)), gpu)):
        raise refused


def _limited(arguments: argparse.Namespace) -> bool:
    return arguments.max_gpu_hours is not None or arguments.max_core_hours is not None


def _observers(graph: StageGraph, view: Progress, report: LiveReport | None) -> Callable[[Snapshot], None]:
    """Return what hears of every tick."""

    def observe(snapshot: Snapshot) -> None:
        view.show(snapshot)
        if report is not None:
            report.show(graph, snapshot)

    return observe


def _results(context: Context, graph: StageGraph, attachments: Path | None) -> Any:
    """Collect the results, write the report, and lay out for the publisher what the tracker shows of it."""
    from orchestrator.report import attachments as files
    from orchestrator.report.collect import collect

    results = collect(root_document(graph), context.store)
    context.store.index.save()
    path = None if context.arguments.no_report else try_report(context, results)
    if path is not None and attachments is not None:
        files.write(results, path, attachments / graph.grid.name)
    return results


def _more_seeds(context: Context, graph: StageGraph) -> StageGraph | None:
    """Return the grid with the seeds that the results now ask for, None when they ask for no more."""
    if graph.grid.adaptive is None:
        return None
    more = context.load_graph()
    if more.stages.keys() <= graph.stages.keys():
        return None
    context.write_root(more)
    return more


def _nothing_to_do(context: Context, graph: StageGraph) -> int:
    console, grid = context.console, graph.grid
    cells, stages = plural(len(grid.cells), "cell"), plural(len(graph.stages), "stage")
    console.print(f"{console.style(grid.name, 'bold')} at scale {grid.scale}: {cells}, {stages}")
    console.print(console.style("nothing to do: every stage is done", "green"))
    _publish_rest(context, graph)
    if len(grid.cells) <= MOST_CELLS_SHOWN:
        show_results(context, graph)
    else:
        console.print(f"results: {again.command(context.arguments, 'table')}")
    return EXIT_DONE


def tick(context: Context, engine: Engine | None = None, graph: StageGraph | None = None) -> int:
    """Do one tick and leave: for cron, or a login node. Exit code 130 while there is more to do."""
    graph = graph or context.load_graph()
    if engine is None:
        _refuse(context, graph)
        context.begin_writing()
        context.write_root(graph)
        engine, _ = open_engine(context, graph)
    console = context.console
    snapshot = engine.tick()
    for label in snapshot.submitted:
        console.print(f"start   {label}")
    for failure in snapshot.failed:
        console.print(f"failure {stage_name(graph, failure.stage)}: {failure.kind}: {failure.message}")
    counts = snapshot.plan.counts()
    console.print(
        f"{counts['done']}/{sum(counts.values())} stages done, {len(snapshot.busy) + len(snapshot.submitted)} at work"
    )
    if snapshot.settled and _more_seeds(context, graph) is None:
        present = context.store.artifacts.keys()
        context.store.index.rebuild(graph.stages.keys() & present, len(present))
        _publish_rest(context, graph)
        return EXIT_FAILED if snapshot.plan.keys("blocked") else EXIT_DONE
    console.print(f"more to do; carry on with: {again.command(context.arguments, 'tick')}")
    return EXIT_DETACHED


def open_engine(context: Context, graph: StageGraph) -> tuple[Engine, Backend]:
    """Return the engine of a grid on the site that the arguments name."""
    arguments = context.arguments
    site = load_site(arguments.site)
    backend = open_backend(site, context.store.url)
    options = Options(
        site=site.name,
        site_file=site.path,
        tracking_uri=context.tracking_uri,
        tick_seconds=site.tick_seconds,
        lease_seconds=site.lease_seconds,
        max_jobs=arguments.max_jobs,
        retry=arguments.retry,
        execution={name: True for name in ("allow_numerics", "allow_code") if getattr(arguments, name)},
    )
    driver.sweep()
    return Engine(graph, context.store, backend, options, context.clock(graph, context.store.artifacts.keys())), backend


def _within_budget(plan: Plan, arguments: argparse.Namespace) -> None:
    for gpu, unit, option in ((True, "GPU", "max_gpu_hours"), (False, "core", "max_core_hours")):
        hours, limit = plan.hours(gpu=gpu), getattr(arguments, option)
        if limit is not None and hours > limit:
            raise MoegridError(
                f"the plan needs {hours:.1f} {unit}-hours, more than --{option.replace('_', '-')} {limit:g}",
                hint="raise the limit, or run a part of the grid with --only",
            )


@contextlib.contextmanager
def _ctrl_c(engine: Engine, resume: str, views: Sequence[Progress], *, detached: bool) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) once: running stages save their states; twice: end them now. On a cluster jobs go on.

    What it means is shown at once by the last of `views`, or on stderr.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        twice = engine.stopped
        engine.stop(now=twice, leave_jobs=detached)
        if detached:
            text = f"detaching: jobs go on; carry on with: {resume}"
        elif twice:
            text = "ending the running stages now"
        else:
            text = "stopping: running stages save their states (Ctrl-C again ends them now)"
        if not (views and views[-1].notice(text)):
            os.write(2, f"\n{text}\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _sidecar(context: Context, graph: StageGraph) -> Iterator[Path | None]:
    """Publish to the tracker from a process of its own; whatever happens to it, the run goes on.

    Yields the folder whose files it attaches at the end, None without a tracker.
    """
    if not context.tracking_uri:
        yield None
        return
    attachments = tempfile.TemporaryDirectory(prefix="moegrid-attached-")
    command = [sys.executable, "-m", "orchestrator.tracking", "--store", context.store.url]
    command += ["--tracking-uri", context.tracking_uri, "--grid", graph.grid.name, "--attachments", attachments.name]
    # A session of its own: Ctrl-C is for the driver, which ends the publisher last.
    publisher = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=module_environment(),
        start_new_session=True,
    )
    host.give_way(publisher.pid)
    try:
        yield Path(attachments.name)
    finally:
        publisher.terminate()
        try:
            said = publisher.communicate(timeout=FINAL_SYNC_SECONDS)[1]
        except subprocess.TimeoutExpired:
            publisher.kill()
            said = publisher.communicate()[1]
        attachments.cleanup()
        if publisher.returncode != 0:
            lines = said.decode(errors="replace").strip().splitlines() or ["the publisher ended early"]
            _not_published(context, lines[-1])


def _publish_rest(context: Context, graph: StageGraph) -> None:
    """Bring the tracker up to date unless it is."""
    if not context.tracking_uri:
        return
    from orchestrator.tracking.service import published, sync

    try:
        if not published(context.store, graph.grid.name, context.tracking_uri):
            sync(context.store, graph.grid.name, context.tracking_uri)
    except MoegridError as error:
        _not_published(context, error.error)


def _not_published(context: Context, why: str) -> None:
    sync = again.command(context.arguments, "sync")
    context.console.print(f"the tracker is not up to date ({why}); nothing is lost: {sync}")


def _conclude(context: Context, graph: StageGraph, engine: Engine, plan: Plan, results: object) -> int:
    console = context.console
    counts = plan.counts()
    blocked = plan.keys("blocked")
    failures = engine.journal.failures(frozenset(blocked))
    show_failures(context, graph, failures)
    if plan.pending:
        where = "states are saved" if engine.backend.name == "local" else "jobs go on"
        console.print(
            f"{console.style('stopped', 'yellow')}: {counts['done']} stages done, {len(plan.pending)} to do, {where}"
        )
        console.print(f"go on with: {again.command(context.arguments, 'resume')}")
        return EXIT_DETACHED
    cells = [cell.id for cell in graph.grid.cells if not set(graph.cells[cell.id].keys) & set(blocked)]
    console.print(
        f"{plural(len(cells), 'cell')} done, {len(graph.grid.cells) - len(cells)} not; "
        f"{plural(counts['done'], 'stage')} done, {counts['blocked']} blocked"
    )
    show_results(context, graph, results)
    if blocked:
        console.print(
            f"go on with: {again.command(context.arguments, 'resume')}   (--retry all tries every failure again)"
        )
        kinds = {own[-1].kind for own in failures.values()}
        return EXIT_UNREACHABLE if kinds <= UNREACHABLE else EXIT_FAILED
    return EXIT_DONE


def show_failures(context: Context, graph: StageGraph, failures: Mapping[str, Sequence[Failure]]) -> None:
    """Print each distinct last failure once, with the stages it hit and its last lines."""
    console = context.console
    distinct: dict[tuple[str, str], list[Failure]] = {}
    for own in failures.values():
        distinct.setdefault((own[-1].kind, own[-1].message), []).append(own[-1])
    for (kind, message), same in distinct.items():
        console.print(f"{console.style('failed', 'red')} {kind}: {message}")
        for failure in same[:4]:
            tries = len(failures[failure.stage])
            often = f", the last of {tries}" if tries > 1 else ""
            console.print(f"  in {stage_name(graph, failure.stage)}, attempt {failure.attempt}{often}")
        if len(same) > 4:
            console.print(f"  and {len(same) - 4} more stages")
        if kind not in EXPLAINED:
            for line in same[-1].tail.splitlines()[-TAIL_LINES:]:
                console.print(console.style(f"    | {line}", "dim"))
        if same[-1].hint:
            console.print(f"  hint: {same[-1].hint}")
