"""`moegrid export`: a cell's final model as a folder that transformers loads."""

from __future__ import annotations

import subprocess
import sys

from orchestrator.commands import again
from orchestrator.commands.context import Context, cell_ids, take_cell
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.settings import module_environment, require


def export(context: Context) -> int:
    """Write the final state of one cell in the layout of an architecture of transformers that computes the same."""
    arguments = context.arguments
    cell_name = take_cell(arguments)
    graph = context.load_graph()
    wanted = cell_ids(graph, cell_name) if cell_name else [cell.id for cell in graph.grid.cells]
    if len(wanted) != 1:
        names = ", ".join(graph.cell(cell).name for cell in wanted[:4])
        raise MoegridError(
            f"{len(wanted)} cells are meant: {names}{', ...' if len(wanted) > 4 else ''}",
            hint="name one: moegrid export 'GRID:CELL' FOLDER",
        )
    state = graph.cells[wanted[0]].final
    if context.store.artifacts.get(state) is None:
        raise MoegridError(
            f"cell {graph.cell(wanted[0]).name!r} has no final state in {context.store.url}",
            hint=again.command(arguments, "run"),
        )
    require("torch", "moegrid export writes a model")
    # The data plane does it, in a process of its own: the control plane never imports torch.
    command = [sys.executable, "-m", "jobs.models.export", "--store", context.store.url, "--state", state]
    code = subprocess.run([*command, arguments.folder], env=module_environment(), check=False).returncode
    if code == EXIT_DONE:
        context.console.print(f"{graph.cell(wanted[0]).name}: written to {arguments.folder}")
    return code
