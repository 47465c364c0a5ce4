"""Signals that ask a node to stop: SIGTERM, SIGUSR2 (schedulers; NCCL takes SIGUSR1) and SIGINT.

A stage without state of its own is interrupted at once by `Preempted`. A training stage defers: it polls
`Signals.requested`, commits a checkpoint and raises `Preempted` itself.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Preempted(BaseException):
    """The process was asked to stop and has saved what it can (not an Exception: no library may swallow it)."""


class Signals:
    """What arrived, and whether the running code wants to be interrupted by it."""

    def __init__(self) -> None:
        self.requested: str = ""
        self._deferred = 0

    def install(self) -> None:
        """Catch the stop signals; call from the main thread, before anything slow."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        if not self._deferred:
            raise Preempted(self.requested)

    def check(self) -> None:
        """Raise `Preempted` when a stop was requested."""
        if self.requested:
            raise Preempted(self.requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
