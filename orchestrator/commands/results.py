"""`moegrid table`, `report`, `sync`, `ui`: what came out, and where to look at it."""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from pathlib import Path
from typing import Any

from orchestrator.catalog.trackers import MLFLOW, TRACKERS, tracker_of
from orchestrator.commands import again
from orchestrator.commands.context import Context
from orchestrator.commands.guard import serve
from orchestrator.errors import EXIT_DONE, MoegridError, StoreError, nearest
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.root import root_document
from orchestrator.settings import module_environment
from orchestrator.ui.console import Console

# What a server may take until it answers, where the browser is to show its page.
SERVER_SECONDS = 120.0


def table(context: Context) -> int:
    """Write the table of results to stdout: one row per setting and seed, factors first, then metrics."""
    from orchestrator.report.formats import render, render_rows
    from orchestrator.report.tables import listed, long_rows

    console = Console(sys.stdout)
    form = (
        "json" if context.arguments.json else context.arguments.format or ("terminal" if console.is_terminal else "md")
    )
    results = _collect(context)
    if form == "terminal":
        text = render(listed(results), form, console.width)
    else:
        text = render_rows(long_rows(results), form)
    sys.stdout.write(text.rstrip("\n") + "\n")
    return EXIT_DONE


def report(context: Context) -> int:
    """Write the report and print where it is."""
    results = _collect(context)
    path = write_report(context, results, context.arguments.output)
    if context.arguments.json:
        context.emit({"report": str(path)})
    else:
        context.console.print(f"report: {_from_here(path)}")
        if not results.metrics:
            context.console.tell(f"nothing of it is measured yet: {again.command(context.arguments, 'run')}")
    if context.arguments.open:
        webbrowser.open(path.resolve().as_uri())
    return EXIT_DONE


def sync(context: Context) -> int:
    """Show everything that the store holds of the grid in the tracker."""
    from orchestrator.store.records import grid_names
    from orchestrator.tracking.service import serve
    from orchestrator.tracking.service import sync as publish

    uri = _tracker(context)
    names = [context.load_grid().name] if context.arguments.grid else grid_names(context.store)
    if context.arguments.follow:
        return serve(context.store, names, uri)
    with tempfile.TemporaryDirectory(prefix="moegrid-sync-") as folder:

        def files(name: str) -> Path:
            from orchestrator.report import attachments, html
            from orchestrator.report.collect import collect

            results = collect(name, context.store)
            page = html.write(results, Path(folder) / name / "page" / "index.html")
            return attachments.write(results, page, Path(folder) / name / "runs")

        for done in publish(context.store, names, uri, files=files):
            added = f"{done.runs} runs, {done.created} new, {done.points} points added"
            context.console.print(f"{done.experiment}: {added}")
    context.console.print(f"tracker: {uri}")
    return EXIT_DONE


def ui(context: Context) -> int:
    """Run the MLflow server of this store's runs, on the loopback interface, and say where its cells are."""
    from orchestrator.tracking.database import experiments
    from orchestrator.tracking.mlflow import VIEW_KEY

    uri, port = _tracker(context), str(context.arguments.port)
    kind = tracker_of(uri).name
    if kind != MLFLOW:
        raise MoegridError(
            f"moegrid ui shows MLflow's pages, and {uri} is no MLflow",
            hint=f"look at it with the tools of {TRACKERS.who(kind)}",
        )
    if uri.startswith(("http://", "https://")):
        context.console.print(f"the tracker is a server already: {uri}")
        return EXIT_DONE
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        raise MoegridError(
            f"there is nothing to show yet: {database} does not exist",
            hint="a run writes it; moegrid sync fills it from a store that is there",
        )
    found = experiments(database) if uri.startswith("sqlite:///") else {}
    chosen = Path(context.arguments.name).stem
    if chosen and chosen not in found:
        raise MoegridError(
            f"{database} holds no grid {chosen!r}",
            cause=f"it holds {', '.join(found) or 'none'}",
            hint=nearest(chosen, list(found)) or f"moegrid sync {chosen} fills it from the store",
        )
    _check_port(int(port))
    pages = {name: f"http://127.0.0.1:{port}/#/experiments/{number}/runs?{VIEW_KEY}" for name, number in found.items()}
    shown = {chosen: pages[chosen]} if chosen else pages
    context.console.print(f"MLflow on port {port} of 127.0.0.1   (Ctrl-C ends it)")
    for name, page in (shown or {"MLflow": f"http://127.0.0.1:{port}"}).items():
        context.console.print(f"  {name}: {page}")
    if context.arguments.open:
        page = next(iter(shown.values()), f"http://127.0.0.1:{port}")
        threading.Thread(target=_open_when_there, args=(int(port), page), daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
    # Its runner of background jobs is seven more processes that showing runs does not need.
    return serve(command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **module_environment()})


def _open_when_there(port: int, page: str) -> None:
    """Show a page in the browser as soon as its server answers."""
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            webbrowser.open(page)
            return
        time.sleep(0.5)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            hint = "end what listens there, or name another with --port"
            raise MoegridError(f"port {port} cannot be used", cause=str(error), hint=hint) from error


def show_results(context: Context, graph: StageGraph, results: Any = None) -> None:
    """Print the table, and where report, runs and the next command are.

    `results` are those of a run whose report was written; without them one is written only where there is none.
    """
    from orchestrator.report.collect import collect
    from orchestrator.report.formats import render
    from orchestrator.report.tables import headline

    console, path = context.console, report_path(context, graph.grid.name)
    written = results is not None
    results = results or collect(root_document(graph), context.store)
    console.print()
    console.print(render(headline(results), "terminal", console.width).rstrip())
    console.print()
    if not context.arguments.no_report and not written and not path.exists():
        try_report(context, results)
    if not context.arguments.no_report and path.exists():
        console.print(f"report: {_from_here(path)}")
    if context.tracking_uri and tracker_of(context.tracking_uri).name != MLFLOW:
        console.print(f"tracker: {context.tracking_uri}")
    elif context.tracking_uri:
        look = shlex.join(["moegrid", "ui", graph.grid.name, *again.place_words(context.arguments)])
        place = context.tracking_uri.replace(f"sqlite:///{Path.cwd()}/", "sqlite:///")
        where, how = f"MLflow: experiment {graph.grid.name!r} in {place}", f"look at it with: {look}"
        if console.width and len(where) + len(how) + 5 > console.width:
            console.print(f"{where}\n    {how}")  # the command in one piece
        else:
            console.print(f"{where}   ({how})")


def _from_here(path: Path) -> Path:
    """Return a path as it is reached from the working directory, in full where it lies elsewhere."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def try_report(context: Context, results: object) -> Path | None:
    """Write the report at the end of a run, which a full disk must not fail."""
    try:
        return write_report(context, results)
    except (MoegridError, OSError) as error:
        context.console.print(f"the report was not written: {error}")
        return None


def report_path(context: Context, grid: str) -> Path:
    """Return where the report of a grid is written: beside a folder store, else in the working directory."""
    local = context.store.objects.local_path("store.json")
    base = local.parent if local is not None else Path.cwd() / "reports"
    return base / "reports" / grid / "index.html" if local is not None else base / grid / "index.html"


def write_report(context: Context, results: Any, output: str = "") -> Path:
    """Write the HTML report with its CSV and LaTeX; return its path."""
    from orchestrator.report.html import write

    path = Path(output) if output else report_path(context, results.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(results, path, again.command(context.arguments, "run"))
    _tell_damage(context, results)
    return path


def _tell_damage(context: Context, results: Any) -> None:
    """Say what the report had to leave out, and let the next run make it again where this command may write."""
    if not results.damaged:
        return
    for key, cause in sorted(results.damaged.items()):
        label = results.document["stages"][key]["label"]
        context.console.print(f"{context.console.style('damaged', 'red')} {label} ({key[:12]}): {cause}")
        with contextlib.suppress(StoreError):
            context.store.artifacts.heal(key)
    context.console.print(
        f"the report leaves out {len(results.damaged)} of its sources; they are made again by: "
        f"{again.command(context.arguments, 'resume')}"
    )


def _collect(context: Context) -> Any:
    """Return the results of the grid as its file has it now; without its file, as the store holds it."""
    from orchestrator.report.collect import collect

    arguments = context.arguments
    if context.stored and not (arguments.overrides or arguments.only or arguments.seeds):
        return collect(arguments.grid, context.store)
    return collect(root_document(context.load_graph()), context.store)


def _tracker(context: Context) -> str:
    if not context.tracking_uri:
        raise MoegridError(
            "there is no tracker",
            cause="it was turned off with 'none'",
            hint="unset MOEGRID_TRACKING, or name one with --tracking sqlite:///FILE or http://HOST:PORT",
        )
    return context.tracking_uri
