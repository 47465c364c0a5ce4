"""What a fork server of a test prepares and calls: a job does what its batch is called."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

PREPARED: list[int] = []


def prepare() -> None:
    """Note in which process this was done."""
    PREPARED.append(os.getpid())


def broken() -> None:
    """Fail as an import does."""
    import a_package_that_does_not_exist  # type: ignore[import-not-found]  # noqa: F401


def call(arguments: Sequence[str]) -> int:
    """Do what the batch's name says."""
    name = arguments[arguments.index("--batch") + 1].partition("-")[0]
    if name == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    own = PREPARED[0] != os.getpid() and os.getsid(0) == os.getpid()
    print(name, "prepared" if own else "", os.environ["OMP_NUM_THREADS"], sys.stdin.read(), flush=True)
    if name == "fail":
        return 3
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "family":
        child = os.fork()
        if not child:
            time.sleep(60)
        print(child, flush=True)
        return 0
    time.sleep(0 if name == "quick" else 60)
    return 0
