"""The report while a grid runs: written again now and then, by a process of its own that the driver never waits for."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from orchestrator.backends import host
from orchestrator.engine.loop import Snapshot
from orchestrator.plan.graph import StageGraph
from orchestrator.settings import module_environment

FIRST_SECONDS = 20.0
# At most this share of a core goes into reports.
SHARE = 0.05
MEASURED = ("train", "evaluate")


class LiveReport:
    """Starts `moegrid report` when something that it shows was committed, and the last one is not too recent."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._stale = False
        self._began = time.monotonic()
        self._next = self._began + FIRST_SECONDS

    def show(self, graph: StageGraph, snapshot: Snapshot) -> None:
        """Take notice of a tick."""
        self._stale |= any(graph.stages[key].kind in MEASURED for key in snapshot.finished if key in graph.stages)
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            self._next = now + max(FIRST_SECONDS, (now - self._began) / SHARE)
        if self._stale and self._process is None and now >= self._next:
            self._stale, self._began = False, now
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(
                self._command,
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                env=module_environment(),
                start_new_session=True,
            )
            host.give_way(self._process.pid)

    def end(self) -> None:
        """End a report that is being written; each of its files is whole or was not touched."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def live_report(words: Sequence[str], store: str, *, wanted: bool) -> Iterator[LiveReport | None]:
    """Yield the live report of the grid that the arguments `words` mean, None unless it is `wanted`."""
    if not wanted:
        yield None
        return
    command = [sys.executable, "-m", "orchestrator", "report", *words, "--store", store, "--tracking", "none"]
    report = LiveReport(command)
    try:
        yield report
    finally:
        report.end()
