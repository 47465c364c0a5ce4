"""`moegrid` with fake stages, and with a fault at one counted point of the driver.

FAULT="kill:37:before" sends this process SIGKILL before its 37th counted call (store write, scheduler call, process
start), `after` right after it; `refuse:37` makes that call fail as a full disk or a silent scheduler would, and
`lie:37` makes it fail after it has done its work. FAULT_COUNT names a file with one line per counted call.
FAKE_HOST pretends to be another machine, FAKE_SKEW shifts this process's clock by seconds, FAKE_HURRY waits no longer
than that many seconds before it tries a stage again, TICK_LOG names a file with a line for each tick (its CPU seconds,
and how often it asked the scheduler), DRIVER_PATIENCE gives up after that many seconds without a store
or scheduler, READ_BYTES is how much it reads to find damage.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator import cli
from orchestrator.backends import host, local, slurm_records
from orchestrator.backends.base import SchedulerUnreachable
from orchestrator.backends.local import LocalBackend
from orchestrator.backends.ray import RayBackend
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.backends.warm import Targets
from orchestrator.engine import audit, loop, retry
from orchestrator.errors import StoreError
from orchestrator.store.local import LocalObjects

STORE_CALLS = ("put", "create", "replace", "upload", "delete")
SCHEDULER_CALLS = ("submit", "find", "cancel", "forget", "_start")
_calls = 0


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call that changes something outside this process."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _calls
        _calls += 1
        number = _calls
        count = os.environ.get("FAULT_COUNT")
        if count:
            with open(count, "a") as file:
                file.write(f"{number} {name} {args[1] if len(args) > 1 and isinstance(args[1], str) else ''}\n")
        fault(name, number, "before")
        result = function(*args, **kwargs)
        fault(name, number, "after")
        return result

    return call


def fault(name: str, number: int, moment: str) -> None:
    """Die or fail here, if this is the place."""
    wanted = os.environ.get("FAULT", "")
    if wanted == f"kill:{number}:{moment}":
        os.kill(os.getpid(), signal.SIGKILL)
    if wanted == (f"refuse:{number}" if moment == "before" else f"lie:{number}"):
        if name.startswith("store."):
            raise StoreError("cannot write", cause="the disk is full", hint="free some space")
        raise SchedulerUnreachable("the scheduler did not answer", cause="injected")


def told_ticks(path: str) -> None:
    """Append to `path` what each tick costs."""
    calls: collections.Counter[str] = collections.Counter()
    real_call, real_tick = slurm_records.call, loop.Engine.tick

    def call(command: Sequence[str], **arguments: Any) -> str:
        calls[command[0]] += 1
        return real_call(command, **arguments)

    def polled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return count

    def tick(engine: loop.Engine) -> loop.Snapshot:
        calls.clear()
        began = time.process_time()
        snapshot = real_tick(engine)
        line = {"cpu": time.process_time() - began, "busy": len(snapshot.busy), "calls": dict(calls)}
        line |= {"done": snapshot.plan.counts()["done"], "submitted": len(snapshot.submitted)}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return snapshot

    slurm_records.call = call
    for name in ("poll", "find", "_cluster"):
        setattr(RayBackend, name, polled(f"ray.{name}", getattr(RayBackend, name)))
    loop.Engine.tick = tick  # type: ignore[method-assign,assignment]


def main() -> int:
    """Run the command line with the faults installed."""
    fake = (sys.executable, str(Path(__file__).with_name("fake_job.py")))
    for backend in (LocalBackend, SlurmBackend, RayBackend):
        defaults: Any = backend.__init__.__kwdefaults__
        defaults["program"] = fake
    # Jobs without a GPU are forked, as those of the product are.
    targets = Targets("tests.faults.fake_job:prepare", "tests.faults.fake_job:call")
    for name, value in (("PROGRAM", fake), ("Targets", lambda: targets)):
        setattr(local, name, value)
    for name in STORE_CALLS:
        setattr(LocalObjects, name, counted(f"store.{name}", getattr(LocalObjects, name)))
    for name in SCHEDULER_CALLS:
        setattr(LocalBackend, name, counted(f"scheduler.{name}", getattr(LocalBackend, name)))
    if other := os.environ.get("FAKE_HOST"):
        host.host_id = lambda: other  # type: ignore[assignment]
    if hurry := os.environ.get("FAKE_HURRY"):
        retry.LONGEST_DELAY = float(hurry)
    if patience := os.environ.get("DRIVER_PATIENCE"):
        loop.PATIENCE_SECONDS = float(patience)
    if limit := os.environ.get("READ_BYTES"):
        audit.READ_BYTES = float(limit)
    if ticks := os.environ.get("TICK_LOG"):
        told_ticks(ticks)
    if skew := float(os.environ.get("FAKE_SKEW", "0")):
        real = time.time
        time.time = lambda: real() + skew
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
