"""How the ranks of a training job meet: one key-value store, a gate that only rank 0 opens, then collectives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from jobs.world import World
from orchestrator.spec.cell import Execution

# How long ranks wait for each other at the start (a cluster may start them minutes apart) and in a collective.
MEET_SECONDS = 600.0
COLLECTIVE_SECONDS = 300.0

_meeting: dist.TCPStore | None = None


def join(world: World, execution: Execution, todo: Sequence[str]) -> list[str]:
    """Meet the other ranks and return the keys of the stages that rank 0 decided to run.

    Rank 0 calls this after it holds the leases, so no other rank starts work that is not theirs.
    """
    global _meeting
    _meeting = dist.TCPStore(
        world.address, world.port, world.size, world.rank == 0, timeout=timedelta(seconds=MEET_SECONDS)
    )
    if world.rank == 0:
        _meeting.set("stages", json.dumps(list(todo)))
    stages = json.loads(_meeting.get("stages"))
    if execution.device == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        "nccl" if execution.device == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", _meeting),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    return list(stages)


def meeting() -> dist.TCPStore:
    """Return the key-value store of the job's ranks; usable from any thread, unlike collectives."""
    assert _meeting is not None, "join() was not called"
    return _meeting
