"""Is the machine ours alone while something is measured? Nobody's niceness helps where it is not.

Linux schedules sessions as groups (autogroups) of equal weight: a low priority inside one keeps nothing from others.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

# A wall time is told with a warning where others take a larger share of the cores than this.
MOST_OTHERS = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def adopt() -> None:
    """Make orphans of this process's descendants its own children, so that their CPU time is counted when they end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap() -> None:
    """Wait for all children that have ended or will."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


@dataclass(frozen=True, slots=True)
class Measured:
    """Wall and CPU seconds of a process tree, and how many cores all other processes kept busy meanwhile."""

    wall: float
    cpu: float
    others: float
    cores: int

    @property
    def quiet(self) -> bool:
        """Can the wall time be trusted?"""
        return self.others <= MOST_OTHERS * self.cores

    def told(self) -> str:
        """Say both, and whether the wall time means anything."""
        loud = (
            ""
            if self.quiet
            else f"  NOT QUIET: others kept {self.others:.2f} of {self.cores} cores busy; wall means nothing"
        )
        return f"{self.cpu:7.1f} CPU s  {self.wall:7.1f} s wall{loud}"


class Meter:
    """Measures what this process's children use from now on; `adopt` comes first."""

    def __init__(self) -> None:
        self._began, self._own, self._busy = time.monotonic(), _tree(), _busy()

    def read(self) -> Measured:
        """Wait for what is left of the children, and return what was used."""
        wall = time.monotonic() - self._began
        busy = _busy() - self._busy
        reap()
        cpu = _tree() - self._own
        return Measured(wall, cpu, max(0.0, busy - cpu) / wall, os.cpu_count() or 1)


def _tree() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _busy() -> float:
    """Return the CPU seconds of all processes since the machine started."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
