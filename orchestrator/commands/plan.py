"""`moegrid plan`: what a run would do, and what it costs."""

from __future__ import annotations

from orchestrator.catalog.gpus import DEFAULT, gpu_of
from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, EXIT_PENDING
from orchestrator.plan.memory import memory_of
from orchestrator.plan.needs import missing_devices, missing_keys
from orchestrator.plan.summary import to_json
from orchestrator.spec.identity import plain


def plan(context: Context) -> int:
    """Show what a run would do; with --exit-code say by 4 that something is to do."""
    from orchestrator.ui.plan_view import show_plan
    from orchestrator.ui.simulation_view import show_memory

    gpus = context.gpus()  # a site that does not exist is a mistake also where nothing runs yet
    graph = context.load_graph()
    result = context.plan(graph, Journal(context.store))
    memory = memory_of(graph)
    if context.arguments.json:
        seeds = {"adaptive": [{**plain(s), "state": s.state} for s in context.seeds]} if graph.grid.adaptive else {}
        lacking = [error for error in (missing_keys(result), missing_devices(result, gpus)) if error]
        told = [{"error": error.error, "cause": error.cause, "hint": error.hint} for error in lacking]
        context.emit({**to_json(result), **seeds, "lacking": told, "memory": [one.to_json() for one in memory]})
    else:
        from orchestrator.backends.host import cores

        show_plan(result, context.console, parallel=cores(), gpus=gpus, adaptive=context.told_seeds(graph))
        show_memory(memory, gpu_of(context.arguments.gpu or DEFAULT), context.console)
        if graph.grid.runnable:
            context.console.print(f"  this scale does not run on site 'local': {graph.grid.runnable}")
    return EXIT_PENDING if context.arguments.exit_code and not result.settled else EXIT_DONE
