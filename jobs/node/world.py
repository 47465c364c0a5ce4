"""The processes of one job: who am I, and how one machine starts several of them.

The environment follows torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Under `srun` rank and size
come from SLURM's own variables; MASTER_ADDR and MASTER_PORT must be given.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from jobs.node.preemption import STOP_SIGNALS
from orchestrator.errors import EXIT_PREEMPTED
from orchestrator.spec.launchers import is_place

# How long the other ranks may take to end after the first one did.
GRACE_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among the `size` processes of the job."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    address: str = ""
    port: int = 0


def world_from(environment: Mapping[str, str]) -> World | None:
    """Return the world that a launcher described, None when nobody did."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", "0"))
    elif "MASTER_ADDR" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        local = int(environment.get("SLURM_LOCALID", "0"))
    else:
        return None
    return World(rank, local, size, environment.get("MASTER_ADDR", ""), int(environment.get("MASTER_PORT", "0")))


def own_world(environment: MutableMapping[str, str], ranks: int) -> World | None:
    """Return this process's place in a job of `ranks` processes, None when it has yet to start them.

    What an outer job says of another world is dropped from `environment`: no library may wait for its ranks.
    """
    try:
        world = world_from(environment)
    except (KeyError, ValueError):
        world = None
    if world is not None and world.size == ranks > 1:
        return world
    for name in [name for name in environment if is_place(name)]:
        del environment[name]
    return World() if ranks == 1 else None


def free_port() -> int:
    """Return a TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Forked:
    """A rank that is forked from this process, which has its imports done: to a launcher what a `Popen` is."""

    def __init__(self, placement: Mapping[str, str], run: Callable[[], int]) -> None:
        """Call `run` in a child with its place in the environment; its result is the child's exit code."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent, self.returncode = os.getpid(), 0
        self.pid = os.fork()
        if not self.pid:
            _be(parent, placement, run)
        self._ended = False

    def poll(self) -> int | None:
        """Return the exit code, negative = the signal, None while it runs."""
        if not self._ended:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # a signal's handler that polls has come between a call's wait and its note
                return self.returncode
            if pid:
                self._ended, self.returncode = True, os.waitstatus_to_exitcode(status)
        return self.returncode if self._ended else None

    def send_signal(self, number: int) -> None:
        """Signal it; not yet reaped, its id is still its own."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def _be(parent: int, placement: Mapping[str, str], run: Callable[[], int]) -> NoReturn:
    """Be a forked rank, to the end: what its launcher has begun is none of its business."""
    code = 1
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.environ.update(placement)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(arguments: Sequence[str], processes: int, run: Callable[[], int] | None = None) -> int:
    """Start `processes` ranks of `python -m jobs.run` on this machine and return the job's exit code.

    With `run` they are forks of this process that call it: it has done what such a process does before it starts.
    Stop signals are passed on. When one rank fails the others get GRACE_SECONDS, then they are killed: they may hang in
    a collective that will never complete.
    """
    port = free_port()
    children: list[subprocess.Popen[bytes] | Forked] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    for rank in range(processes):
        placement = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if run is not None:
            children.append(Forked(placement, run))
            continue
        command = [sys.executable, "-m", "jobs.run", *arguments]
        environment = {**os.environ, **placement}
        children.append(subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent))
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() is not None for child in children):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    if codes[0] == 0 or codes[0] == EXIT_PREEMPTED or all(code in (0, codes[0]) for code in codes):
        return codes[0] if codes[0] > 0 else int(codes[0] != 0)
    return next((code for code in codes if code > 0), 1)
