"""`moegrid init`: a folder to start from, with a grid and a Makefile."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator import resources
from orchestrator.commands.begin import write_new
from orchestrator.errors import EXIT_DONE
from orchestrator.ui.typed import as_typed

# file that comes with the project -> where it goes in the new folder
_FILES = {"infra/init/my_grid.yaml": "grids/my_grid.yaml", "infra/init/Makefile": "Makefile"}


def init(arguments: argparse.Namespace) -> int:
    """Write the files of a new project folder; refuses, before writing anything, where one of them exists."""
    folder = Path(arguments.folder)
    texts = {folder / target: resources.project(source).read_text("utf-8") for source, target in _FILES.items()}
    write_new(texts, "moegrid init", "name an empty folder: moegrid init my_experiments")
    go = "" if folder == Path(".") else f"cd {folder} && "
    print(as_typed(f"next: {go}moegrid plan my_grid   (then: moegrid run my_grid)", folder))
    return EXIT_DONE
