"""`moegrid plan`: what a run would do, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.catalog.gpus import DEFAULT, gpu_of
from orchestrator.commands.context import Context
from orchestrator.engine.forecast import forecast
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, EXIT_PENDING
from orchestrator.plan.graph import build_graph
from orchestrator.plan.memory import memory_of
from orchestrator.plan.needs import missing_devices, missing_keys
from orchestrator.plan.plan import Plan
from orchestrator.plan.summary import to_json
from orchestrator.spec.identity import plain


def plan(context: Context) -> int:
    """Show what a run would do; with --exit-code say by 4 that something is to do."""
    from orchestrator.ui.plan_view import show_plan
    from orchestrator.ui.simulation_view import show_memory

    budget = context.budget()  # a site that does not exist is a mistake also where nothing runs yet
    gpus = budget.gpus if budget else None
    graph = context.load_graph()
    result = context.plan(graph, Journal(context.store))
    memory = memory_of(graph)
    if context.arguments.json:
        seeds: dict[str, object] = {}
        if graph.grid.adaptive:
            seeds = {"adaptive": [plain(s) for s in context.seeds], "adaptive_cost": plain(_cost(context, result))}
        lacking = [error for error in (missing_keys(result), missing_devices(result, gpus)) if error]
        told = [{"error": error.error, "cause": error.cause, "hint": error.hint} for error in lacking]
        runs = budget is not None and missing_devices(result, gpus) is None
        times = {"schedule": forecast(result, budget).to_json()} if budget and runs else {}
        rest = {**seeds, **times, "lacking": told, "memory": [one.to_json() for one in memory]}
        context.emit({**to_json(result), **rest})
    else:
        told_seeds = context.told_seeds(graph)
        if told_seeds:
            told_seeds += f"\n  {_cost(context, result).told()}"
        show_plan(result, context.console, budget=budget, adaptive=told_seeds)
        show_memory(memory, gpu_of(context.arguments.gpu or DEFAULT), context.console)
        if graph.grid.runnable:
            context.console.print(f"  this scale does not run on site 'local': {graph.grid.runnable}")
    return EXIT_PENDING if context.arguments.exit_code and not result.settled else EXIT_DONE


@dataclass(frozen=True, slots=True)
class Range:
    """A number as it is now, as expected (None: unknown), and at most."""

    now: float
    expected: float | None
    most: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The cells of an adaptive grid, and the hours that are left."""

    unit: str
    cells: Range
    hours: Range

    def told(self) -> str:
        """Return the line of the plan about it."""
        about = "expected: not known before two seeds of each setting are measured"
        if self.hours.expected is not None:
            about = f"expected about {self.cells.expected:.0f} cells and {self.hours.expected:.2f} {self.unit} left"
        return f"{about}; at most {self.cells.most:.0f} cells and {self.hours.most:.2f}"


def _cost(context: Context, result: Plan) -> Cost:
    """Return cells and hours left of an adaptive grid: with the cells that it has now, as expected, at most.

    What is expected is None where no deviation was measured yet.
    """
    from orchestrator.report.adaptive import expected_cells

    share = not getattr(context.arguments, "no_share", False)
    grid, now = context.load_grid(), len(result.graph.grid.cells)
    whole = build_graph(replace(grid, cells=(*grid.cells, *grid.reserve)), share=share)
    gpu = result.hours(gpu=True) > 0
    least, most = result.hours(gpu=gpu), context.plan(whole, Journal(context.store)).hours(gpu=gpu)
    cells = expected_cells(grid, context.store, share=share)
    room = len(whole.grid.cells) - now
    hours = None
    if cells is not None:
        cells = max(cells, float(now))
        hours = least + (most - least) * ((cells - now) / room if room else 0.0)
    unit = "GPU-hours" if gpu else "core-hours"
    return Cost(unit, Range(now, cells, len(whole.grid.cells)), Range(least, hours, most))
