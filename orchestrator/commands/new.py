"""`moegrid new KIND NAME`: a plugin of one's own to start from, with a test that passes as it stands."""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path

from orchestrator import catalog, resources
from orchestrator.commands.begin import write_new
from orchestrator.errors import EXIT_DONE, MoegridError, did_you_mean
from orchestrator.registry import REGISTRIES

TEMPLATES = resources.project("infra/new")
PLACEHOLDER = "NAME"
# Kind -> the registry that has its names.
KINDS = {"router": "routers", "loss": "losses", "metric": "metrics", "task": "tasks", "suite": "suites"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def new(arguments: argparse.Namespace) -> int:
    """Write the files of a new plugin; refuses, before writing anything, where one of them exists."""
    kind, name, folder = arguments.kind, arguments.name, Path(arguments.folder)
    if kind not in KINDS:
        raise MoegridError(f"there is no kind {kind!r} to begin", hint=did_you_mean(kind, KINDS, "kinds"))
    _check(kind, name)
    everything = (path for path in (TEMPLATES / kind).rglob("*") if path.is_file())
    sources = sorted(path for path in everything if "__pycache__" not in path.parts)
    named = {source: source.relative_to(TEMPLATES / kind).as_posix().replace(PLACEHOLDER, name) for source in sources}
    texts = {folder / path: source.read_text("utf-8").replace(PLACEHOLDER, name) for source, path in named.items()}
    write_new(texts, "moegrid new", "choose another name or folder")
    test = next(path for path in texts if path.name.startswith("test_"))
    plugin = name if (folder / name).is_dir() else f"{name}.py"
    print(f"next: python -m pytest {test}")
    print(f"then, in a grid beside it: plugins: [./{plugin}]   (its docstring says how the grid uses it)")
    return EXIT_DONE


def _check(kind: str, name: str) -> None:
    """Raise MoegridError unless `name` can be a module of Python and a name that nobody has."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        hint = "use small letters, digits and _, a letter first"
        raise MoegridError(f"{name!r} cannot be the name of a {kind}", hint=hint)
    catalog.load_all()
    if name in REGISTRIES[KINDS[kind]]:
        raise MoegridError(f"there is a {kind} {name!r} already", hint="choose another name")
