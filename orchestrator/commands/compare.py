"""`moegrid compare`, `paper`: grids against each other, and against the papers; from the store alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orchestrator.commands.context import Context
from orchestrator.errors import EXIT_DONE


def compare(context: Context) -> int:
    """Write the differences between two grids of the store, setting by setting, to stdout."""
    from orchestrator.report.collect import collect
    from orchestrator.report.formats import render
    from orchestrator.report.tables import grids

    arguments = context.arguments
    first, second = (collect(Path(name).stem, context.store) for name in (arguments.a, arguments.b))
    sys.stdout.write(render(grids(first, second), "json" if arguments.json else arguments.format))
    return EXIT_DONE


def paper(context: Context) -> int:
    """Write a report for every grid of the papers that the store has results for, and say what is missing."""
    from orchestrator.report import paper as papers

    folder = Path(context.arguments.output)
    shown = papers.write(context.store, folder)
    if context.arguments.json:
        rows = [{"paper": s.exhibit.paper, "name": s.exhibit.name, "path": s.path, "missing": s.reason} for s in shown]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return EXIT_DONE
    for item in shown:
        exhibit = f"{item.exhibit.paper} {item.exhibit.name}"
        context.console.print(f"{exhibit:32} {item.path or 'missing: ' + item.reason}")
    context.console.print(f"overview: {folder / 'index.md'}")
    return EXIT_DONE
