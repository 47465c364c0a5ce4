"""What most commands need: the grid, its graph, the store, and the plan as the store stands."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.engine.journal import Journal
from orchestrator.errors import GridError, MoegridError, StoreError
from orchestrator.grid.files import find_grid
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.cost import Clock, shape_of
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import Plan, make_plan
from orchestrator.plan.root import root_digest, root_document
from orchestrator.settings import load_site, open_backend, site_file, store_url, tracking_uri
from orchestrator.store import Store, records
from orchestrator.ui.console import Console

if TYPE_CHECKING:
    from orchestrator.backends.local import Budget
    from orchestrator.report.adaptive import Seeds

# Commands that write into a store which is there, and that need one; a run makes it, all others only read.
WRITES = ("cancel", "sync")
NEEDS = WRITES
# Commands whose text is their answer: it goes to stdout, so that `plan g | less` and `status g > f` work.
ANSWERS = ("plan", "simulate", "status", "explain", "diff", "gc", "report", "dashboard")
# Finished stages looked at for time estimates, per phase and suite.
SAMPLES = 24


@dataclass
class Context:
    """A command's arguments, opened."""

    arguments: argparse.Namespace
    console: Console
    store: Store
    tracking_uri: str
    seeds: tuple[Seeds, ...] = ()  # of the graph loaded last, where their number is adaptive

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> Context:
        """Open the store as the command needs it; raises StoreError (exit code 3) with the remedy.

        A command that reads changes nothing in it; a run makes it and writes into it when it begins (`begin_writing`).
        """
        url, command = store_url(arguments.store), arguments.command
        if command != "doctor":  # which tells it among all else that it finds
            site_file(getattr(arguments, "site", "local"))
        answers = command in ANSWERS and not getattr(arguments, "json", False)
        console = Console(sys.stdout if answers else sys.stderr)
        context = cls(arguments, console, Store.peek(url), tracking_uri(arguments.tracking, url))
        deletes = command == "gc" and arguments.delete
        if context.store.exists:
            if command in WRITES or deletes:
                context.begin_writing()
            return context
        if command in NEEDS or deletes or (command == "report" and not arguments.output):
            raise StoreError(
                f"there is no store at {url}",
                hint="moegrid run GRID makes one; --store or MOEGRID_STORE (STORE= of make) names another",
            )
        if command in ("status", "table"):
            Console().print(f"there is no store at {url} yet: a run makes it")
        return context

    def begin_writing(self) -> None:
        """Open the store to be written to, and make it if it does not exist yet."""
        self.store = Store.open(self.store.url)

    def load_grid(self) -> Grid:
        """Load the grid that the arguments name; raises GridError with all its problems."""
        if self.stored:
            name = self.arguments.grid
            raise MoegridError(
                f"the file of grid {name!r} is not at hand",
                cause=f"{self.store.url} holds what was run of it; no grids/{name}.yaml is here or below MOEGRID_PATH",
                hint=f"name the file by its path; moegrid table, report, compare and effects read {name} without it",
            )
        return grid_of(self.arguments)

    @property
    def stored(self) -> bool:
        """Whether the grid that the arguments name was run in this store while its file is not at hand."""
        try:
            find_grid(self.arguments.grid)
        except GridError:
            return self.store.exists and self.arguments.grid in records.grid_names(self.store)
        return False

    def load_graph(self) -> StageGraph:
        """Lower the grid, with the seeds that its results ask for, to its stages."""
        # Ten thousand cells are a million small objects that live as long as the process: nothing to collect.
        gc.disable()
        try:
            grid, share = self.load_grid(), not getattr(self.arguments, "no_share", False)
            if grid.adaptive is not None:
                from orchestrator.report.adaptive import grown

                grid, self.seeds = grown(grid, self.store, share=share)
            return build_graph(grid, share=share)
        finally:
            gc.freeze()
            gc.enable()

    def told_seeds(self, graph: StageGraph) -> str:
        """Return the line about an adaptive number of seeds, "" for a grid without one."""
        if not self.seeds or graph.grid.adaptive is None:
            return ""
        from orchestrator.report.adaptive import told

        return told(self.seeds, graph.grid.adaptive)

    def write_root(self, graph: StageGraph) -> None:
        """Record this version of the grid, before anything of the store is read for a plan."""
        name, digest = graph.grid.name, root_digest(graph)
        versions = sorted((entry.modified, entry.path) for entry in self.store.objects.list(f"grids/{name}"))
        newest = versions[-1][1] if versions else ""
        if newest != f"grids/{name}/{digest}.json" or not self.store.has_root(name, digest):
            self.store.write_root(name, digest, root_document(graph))

    def plan(self, graph: StageGraph, journal: Journal, clock: Clock | None = None) -> Plan:
        """Plan the grid as the store stands: what is done, what goes on from where, what is blocked by what.

        `clock` estimates times; None = one that finished stages of the grid calibrate.
        """
        stages = frozenset(graph.stages)
        present = self.store.artifacts.keys() & stages
        missing = stages - present
        failed = journal.given_up(missing)
        attempted = self.store.claims.claimed(missing) if missing else set()
        every = self.store.artifacts.keys() if attempted else present
        clock = clock or (self.clock(graph, present) if missing else Clock())
        damaged = self.store.artifacts.damaged(missing) if missing else set()
        return make_plan(graph, every, failed=failed, attempted=attempted, damaged=damaged, clock=clock)

    def budget(self) -> Budget | None:
        """Return what this machine gives to jobs where they would run on it, None where a scheduler has its own."""
        site = load_site(self.arguments.site)
        backend = open_backend(site, self.store.url) if site.backend == "local" else None
        return getattr(backend, "budget", None)

    def clock(self, graph: StageGraph, present: Collection[str]) -> Clock:
        """Estimate times from finished stages of the same shape."""
        chosen: dict[tuple[object, ...], list[str]] = {}
        for key, stage in graph.stages.items():
            if key in present:
                sample = chosen.setdefault(shape_of(stage, graph.resources(key)), [])
                if len(sample) < SAMPLES:
                    sample.append(key)
        manifests = self.store.artifacts.many([key for keys in chosen.values() for key in keys])
        return Clock.from_finished((graph.stages[key], graph.resources(key), m.info) for key, m in manifests.items())

    def emit(self, value: object) -> None:
        """Write JSON to stdout."""
        json.dump(value, sys.stdout, indent=2, allow_nan=False, default=str)
        sys.stdout.write("\n")

    def emit_listed(self, head: Mapping[str, object], name: str, items: Iterable[object]) -> None:
        """Write the JSON of `{**head, name: [*items]}` to stdout, of which no more than an item is held."""
        opening = json.dumps(dict(head), indent=2, allow_nan=False, default=str).removesuffix("\n}")
        sys.stdout.write(f"{opening},\n  {json.dumps(name)}: [")
        before = "\n"
        for item in items:
            text = json.dumps(item, indent=2, allow_nan=False, default=str)
            sys.stdout.write(f"{before}    " + text.replace("\n", "\n    "))
            before = ",\n"
        sys.stdout.write("]\n}\n" if before == "\n" else "\n  ]\n}\n")


def split_cell(name: str) -> tuple[str, str]:
    """Return (grid, cell) of `GRID:CELL`; the cell is "" when none is named. A file may have a colon in its path."""
    if Path(name).is_file():
        return name, ""
    grid, _, cell = name.partition(":")
    return grid, cell


def take_cell(arguments: argparse.Namespace) -> str:
    """Leave the grid alone in the argument `GRID[:CELL]` and return the cell."""
    arguments.grid, cell = split_cell(arguments.grid)
    return cell


def grid_of(arguments: argparse.Namespace) -> Grid:
    """Load the grid that the arguments name."""
    return load_grid(
        arguments.grid,
        scale=arguments.scale,
        overrides=tuple(arguments.overrides),
        only=tuple(arguments.only),
        seeds=arguments.seeds,
    )


def cell_ids(graph: StageGraph, name: str) -> list[str]:
    """Return the ids of the cells that `name` means: an id (or its beginning), a name, or a setting.

    Raises MoegridError naming the nearest cells.
    """
    for matches in (
        [cell.id for cell in graph.grid.cells if cell.name == name],
        [cell.id for cell in graph.grid.cells if cell.setting == name],
        [cell.id for cell in graph.grid.cells if cell.id.startswith(name)],
        [cell.id for cell in graph.grid.cells if name in cell.name],
    ):
        if matches:
            return matches
    from orchestrator.errors import nearest

    names = [cell.name for cell in graph.grid.cells]
    raise MoegridError(
        f"grid {graph.grid.name!r} has no cell {name!r}",
        hint=nearest(name, names) or f"cells: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}",
    )
