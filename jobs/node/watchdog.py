"""Ends a process whose training step never ends: a collective that waits for a rank that is gone, a stuck device.

Leases and heartbeats come from a thread of their own and would go on for ever; only the step itself tells.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.errors import MoegridError


class Hung(MoegridError):
    """A training step took longer than `execution.hang_seconds`."""

    failure_kind = "hung"


class Watchdog:
    """Watches the guarded parts of the thread that made it; `end` is called, in another thread, when one hangs."""

    def __init__(self, seconds: float = 0.0, end: Callable[[Hung], None] = lambda hung: None) -> None:
        """A part hangs after `seconds`; 0 = never."""
        self._seconds = seconds
        self._end = end
        self._watched = threading.get_ident()
        self._armed: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Watch the block, which people know as `what`."""
        if self._seconds > 0 and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        self._armed = (what, time.monotonic())
        try:
            yield
        finally:
            self._armed = None

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 10))
            armed = self._armed
            if armed is not None and time.monotonic() - armed[1] > self._seconds:
                stack = traceback.format_stack(sys._current_frames()[self._watched])
                self._end(
                    Hung(
                        f"{armed[0]} hangs: it has not ended within {self._seconds:g} s",
                        cause=f"in {place(stack)}",
                        hint="it is tried again from the last state; a step that really takes longer needs a larger "
                        "execution.hang_seconds. Every rank's log says where it was: moegrid logs --rank N",
                    )
                )
                return


def place(stack: list[str]) -> str:
    """Return the innermost line of a formatted stack, in one line."""
    return " ".join(stack[-1].split()) if stack else "an unknown place"
