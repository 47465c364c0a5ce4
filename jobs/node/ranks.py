"""How the ranks of a job meet: one key-value store, a gate that only rank 0 opens, then collectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from jobs.node.sockets import bind_collectives, listen
from jobs.node.world import World
from orchestrator.spec.cell import Execution

# How long ranks wait for each other at the start: a cluster may start them minutes apart.
MEET_SECONDS = 600.0
# How much longer than a step a collective may take: the watchdog of the step comes first, and says where it was.
COLLECTIVE_MARGIN_SECONDS = 60.0
POLL_SECONDS = 0.1
LEAVE_SECONDS = 5.0

_meeting: TCPStore | None = None


def join(world: World, execution: Execution, todo: Sequence[str], *, nodes: int = 1) -> list[str]:
    """Meet the other ranks and return the keys of the stages that rank 0 decided to run.

    Rank 0 calls this after it holds the leases, so no other rank starts work that is not theirs.
    """
    global _meeting
    listener = listen(world.address, world.port, across_nodes=nodes > 1) if world.rank == 0 else None
    bind_collectives(world.address, world.port)
    _meeting = TCPStore(
        world.address,
        world.port,
        world.size,
        world.rank == 0,
        timeout=timedelta(seconds=MEET_SECONDS),
        master_listen_fd=listener,
    )
    if world.rank == 0:
        _meeting.set("stages", json.dumps(list(todo)))
    stages = json.loads(_meeting.get("stages"))
    if execution.device == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        "nccl" if execution.device == "cuda" else "gloo",
        store=PrefixStore("collectives", _meeting),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=(execution.hang_seconds or MEET_SECONDS) + COLLECTIVE_MARGIN_SECONDS),
    )
    return list(stages)


def meeting() -> TCPStore:
    """Return the key-value store of the job's ranks; usable from any thread, unlike collectives."""
    assert _meeting is not None, "join() was not called"
    return _meeting


def turns(name: str, count: int, world_size: int) -> Iterator[int]:
    """Yield the numbers below `count` that this rank is to work on: each goes to the rank that asks for it first."""
    if world_size == 1:
        yield from range(count)
        return
    while (number := meeting().add(f"turns/{name}", 1) - 1) < count:
        yield number


def meet(name: str, rank: int, world_size: int, check: Callable[[], None] = lambda: None) -> None:
    """Return once every rank has called this with `name`; `check` is called while waiting, and may raise.

    Unlike a collective it has no deadline: one rank's share of an evaluation may take hours longer than another's.
    """
    if world_size == 1:
        return
    meeting().set(f"met/{name}/{rank}", "")
    _await([f"met/{name}/{number}" for number in range(world_size)], check)


def _await(names: Sequence[str], check: Callable[[], None]) -> None:
    while not meeting().check(list(names)):
        check()
        time.sleep(POLL_SECONDS)


def told(names: Sequence[str], patience: float) -> list[bytes]:
    """Return what was set under `names`, once all is; torch's DistStoreError after `patience` seconds.

    While the store's own `wait` runs no other thread of the process can ask the store anything.
    """
    end = time.monotonic() + patience

    def check() -> None:
        if time.monotonic() > end:
            meeting().wait(list(names), timedelta(milliseconds=1))

    _await(names, check)
    return [meeting().get(name) for name in names]


def said(name: str, word: str, rank: int, world_size: int, check: Callable[[], None] = lambda: None) -> list[str]:
    """Return what every rank said under `name`, rank by rank, once all have; `check` is called as by `meet`."""
    meeting().set(f"said/{name}/{rank}", word)
    everyone = [f"said/{name}/{number}" for number in range(world_size)]
    _await(everyone, check)
    words = [meeting().get(one).decode() for one in everyone]
    # What was said may end the job, and the words are gone with rank 0: it is the last to know them.
    if rank:
        meeting().set(f"heard/{name}/{rank}", "")
    else:
        _await([f"heard/{name}/{number}" for number in range(1, world_size)], check)
    return words


def leave(rank: int, world_size: int) -> None:
    """Let every rank of a job that ended well wait for rank 0, which commits: whoever starts ranks ends stragglers."""
    if world_size == 1 or _meeting is None:
        return
    if rank == 0:
        _meeting.set("ended", "")
        # Its store goes with it: who still asks would say so in the log, as if something had failed.
        end = time.monotonic() + LEAVE_SECONDS
        while _meeting.add("left", 0) < world_size - 1 and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return
    try:
        while not _meeting.check(["ended"]):
            time.sleep(POLL_SECONDS)
        _meeting.add("left", 1)
    except dist.DistNetworkError:  # rank 0 has gone, and its store with it
        return
