"""How tables are read: what pyarrow starts for it must not outlive the reader."""

from __future__ import annotations

import ast

from orchestrator.resources import ROOT


def test_whole_tables_are_read_without_threads() -> None:
    """pyarrow 25.0.1: a process that ends right after `read_table` with threads is aborted on a busy machine.

    `moegrid data show` is such a process: nine of 32 ended with SIGABRT after their answer, none without threads.
    Readers of batches do not start those threads.
    """
    found = []
    for folder in ("orchestrator", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "read_table":
                    asked = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    found.append((path.relative_to(ROOT).as_posix(), asked.get("use_threads")))
    assert found == [("jobs/data/whole_tables.py", "False")], "read it by jobs.data.whole_tables"
