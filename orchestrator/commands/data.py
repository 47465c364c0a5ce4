"""`moegrid data`: the data sets that need no hub, and a page of examples of any set."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import webbrowser
from pathlib import Path

from orchestrator.catalog.pins import FORMATS, PACKAGES, package_of
from orchestrator.catalog.sources import scheme_of
from orchestrator.data.pinning import pin
from orchestrator.errors import EXIT_DONE, MoegridError, did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.settings import module_environment
from orchestrator.spec.cell import DataSpec
from orchestrator.ui.console import Console, columns

_SHOWN = ("text", "instruction", "chat", "vision", "items")


def data(arguments: argparse.Namespace) -> int:
    """List the sets of the pinned packages, or write a page of examples of one set and print where it is."""
    if arguments.action == "list":
        if arguments.source:
            hint = f"moegrid data show {arguments.source} shows one"
            raise MoegridError("moegrid data list names all sets", hint=hint)
        return _list(as_json=arguments.json)
    if not arguments.source:
        raise MoegridError("moegrid data show needs a set", hint="moegrid data list names those that need no hub")
    spec = _pinned(arguments)
    question = {
        "data": {"source": spec.source, "format": spec.format, "digest": spec.digest, "revision": spec.revision},
        "rows": arguments.rows,
        "seed": arguments.seed,
        "tasks": arguments.task,
    }
    # The data plane reads it, in a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "jobs.data.show"],
        input=json.dumps(question), stdout=subprocess.PIPE, text=True, env=module_environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        return done.returncode
    return _written(arguments, json.loads(done.stdout))


def _list(*, as_json: bool) -> int:
    rows = [
        {"source": f"{package.url}/{name}", "format": FORMATS[name], "licence": package.licence or "each set's own"}
        for package in PACKAGES.values()
        for name in package.sets
    ]
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return EXIT_DONE
    console = Console(sys.stdout)
    head = ("set", "format", "licence of the content")
    told = [head, *((row["source"], row["format"], row["licence"]) for row in rows)]
    for line in columns(told, width=console.width):
        console.print(line)
    console.print("docs/data.md has the licences; hub:// and file:// sets are shown too")
    return EXIT_DONE


def _pinned(arguments: argparse.Namespace) -> DataSpec:
    source = arguments.source
    made = "vision" if scheme_of(source) in ("npm", "deb") else "text"
    form = arguments.format or (FORMATS.get(source.rpartition("/")[2], made) if package_of(source) else made)
    if arguments.format and form not in _SHOWN:
        raise MoegridError(f"--format {form!r} is none that is shown", hint=did_you_mean(form, _SHOWN, "formats"))
    if form not in _SHOWN:
        raise MoegridError(f"{source} holds no rows that can be shown", hint=f"--format is one of {', '.join(_SHOWN)}")
    try:
        return pin(DataSpec(source, format=form, revision=arguments.revision), Path.cwd())
    except Mistake as mistake:
        raise MoegridError(mistake.message, hint=mistake.hint) from None


def _written(arguments: argparse.Namespace, answer: dict[str, object]) -> int:
    from orchestrator.report.examples import Answer, page

    name = re.sub(r"[^A-Za-z0-9.@=-]+", "-", arguments.source.partition("://")[2]).strip("-.") or "set"
    path = Path(arguments.output or f"reports/data/{name[-80:]}.html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(page(arguments.source, Answer.read(answer)), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        cause = error.strerror or str(error)
        raise MoegridError(f"{path} cannot be written", cause=cause, hint="name another place: --output FILE") from None
    if arguments.json:
        json.dump({"page": str(path)}, sys.stdout)
        print()
    else:
        print(f"page: {path}")
    if arguments.open:
        webbrowser.open(path.resolve().as_uri())
    return EXIT_DONE
