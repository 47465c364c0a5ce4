"""`moegrid compare`, `effects`: grids against each other; from the store alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator import resources
from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DONE, MoegridError, did_you_mean, nearest
from orchestrator.store.records import grid_names
from orchestrator.ui.console import Console


def compare(context: Context) -> int:
    """Write the differences between two grids of the store, setting by setting, to stdout."""
    from orchestrator.report.collect import collect
    from orchestrator.report.formats import render
    from orchestrator.report.tables import grids

    arguments = context.arguments
    names = [Path(name).stem for name in (arguments.a, arguments.b)]
    _were_run(context, names)
    first, second = (collect(name, context.store) for name in names)
    width = Console(sys.stdout).width
    sys.stdout.write(render(grids(first, second), "json" if arguments.json else arguments.format, width))
    return EXIT_DONE


def effects(context: Context) -> int:
    """Write to stdout what each factor does over the cells of one or several grids of the store."""
    from orchestrator.report.collect import collect
    from orchestrator.report.effects import table
    from orchestrator.report.formats import render

    arguments = context.arguments
    names = list(dict.fromkeys(Path(name).stem for name in arguments.grids))
    _were_run(context, names)
    several = [collect(name, context.store) for name in names]
    scales = {str(results.document["scale"]): results.name for results in several}
    if len(scales) > 1:
        told = ", ".join(f"{name} at {scale}" for scale, name in scales.items())
        raise MoegridError(
            "grids of several scales have no effects in common", cause=told, hint="name grids of one scale"
        )
    known = list(dict.fromkeys(metric for results in several for metric in results.metrics))
    metrics = arguments.metric or list(dict.fromkeys(m for results in several for m in results.primary if m in known))
    for metric in metrics:
        if metric not in known:
            hint = did_you_mean(metric, known, "metrics")
            raise MoegridError(f"no cell of {', '.join(names)} has the metric {metric!r}", hint=hint)
    found = table(several, metrics)
    if found is None:
        cause = "it takes two levels of some factor, and more cells than levels and seeds"
        raise MoegridError(
            f"{', '.join(names)} tell no effects of factors", cause=cause, hint="run more seeds or cells"
        )
    sys.stdout.write(render(found, "json" if arguments.json else arguments.format, Console(sys.stdout).width))
    return EXIT_DONE


def _were_run(context: Context, names: Sequence[str]) -> None:
    """Raise MoegridError naming the grids of the store when one of `names` is none of them."""
    known = grid_names(context.store)
    for name in names:
        if name in known:
            continue
        hint = nearest(name, known)
        if not hint and name in resources.files("grid"):
            hint = f"run it first: moegrid run {name}"
        raise MoegridError(
            f"the store has no grid {name!r}",
            cause=f"grids that were run in {context.store.url}: {', '.join(known) or 'none'}",
            hint=hint or "this takes grids that were run in this store",
        )
