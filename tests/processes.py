"""Races between real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PRELUDE = """
import sys
from orchestrator.store import *
store, me = Store.open(sys.argv[1]), sys.argv[2]
sys.stdin.read()
"""


def race(code: str, url: str, count: int) -> list[str]:
    """Run `code` in `count` processes that have opened the store `url` and begin at one moment; what each printed.

    `code` sees `store` and `me`, the process's number as text.
    """
    runners = [
        subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + code, url, str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for runner in runners:
        assert runner.stdin is not None
        runner.stdin.close()
        runner.stdin = None
    return [runner.communicate(timeout=120)[0].strip() for runner in runners]
