"""`moegrid init`: a folder to start from, with a grid and a Makefile."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator import resources
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.ui.typed import as_typed

# file that comes with the project -> where it goes in the new folder
_FILES = {"infra/init/my_grid.yaml": "grids/my_grid.yaml", "infra/init/Makefile": "Makefile"}


def init(arguments: argparse.Namespace) -> int:
    """Write the files of a new project folder; refuses, before writing anything, where one of them exists."""
    folder = Path(arguments.folder)
    targets = {resources.project(source): folder / target for source, target in _FILES.items()}
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing:
        raise MoegridError(
            f"{existing[0]} exists already",
            cause="moegrid init overwrites nothing",
            hint="name an empty folder: moegrid init my_experiments",
        )
    for source, target in targets.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise MoegridError(f"{target} cannot be written", cause=str(error), hint="name another folder") from error
        print(target)
    go = "" if folder == Path(".") else f"cd {folder} && "
    print(as_typed(f"next: {go}moegrid plan my_grid   (then: moegrid run my_grid)", folder))
    return EXIT_DONE
