"""docs/extend.md quotes the example package: what it shows is what is installed and run by a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from orchestrator import catalog
from orchestrator.registry import REGISTRIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text()
EXAMPLE = ROOT / "examples" / "moegrid-example"
# `<!-- FILE:NAME,NAME -->` before a block: these definitions of the file, or all of it.
QUOTES = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)\n```", PAGE, re.DOTALL)


def source(quoted: str) -> str:
    """Return what `FILE:NAME,NAME` of the example says."""
    path, _, names = quoted.partition(":")
    text = (EXAMPLE / path).read_text()
    if not names:
        return text.rstrip("\n")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return "\n\n\n".join(found[name] for name in names.split(","))


@pytest.mark.parametrize(("quoted", "shown"), QUOTES, ids=[quoted for quoted, _ in QUOTES])
def test_what_is_shown_is_what_is_run(quoted: str, shown: str) -> None:
    assert shown == source(quoted)


def test_every_part_of_the_example_is_shown_and_every_kind_named() -> None:
    shown = {quoted.partition(":")[0] for quoted, _ in QUOTES}
    parts = {path.relative_to(EXAMPLE).as_posix() for path in EXAMPLE.rglob("*.py") if path.name != "__init__.py"}
    named = {part for part in parts if f"`{part}`" in PAGE}
    assert parts <= shown | named
    catalog.load_all()
    kinds = {one.kind.__name__: group for group, one in REGISTRIES.items() if one.kind.__module__.startswith("orch")}
    missing = [kind for kind, group in kinds.items() if kind not in PAGE and f"moegrid.{group}" not in PAGE]
    assert not missing
