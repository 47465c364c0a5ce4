"""States to and from the store: the training thread pays one copy to host memory, the rest happens in the background.

Blobs of a state: `weights.safetensors`, `optimizer.safetensors` (or one shard a rank), `state.json` (where training
stood) and `series.json` (the segment's logged rows, each step once).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.context import StageContext
from jobs.models.backbones import tensors_sha256
from jobs.train.engines import Engine
from orchestrator.spec.work import TrainWork
from orchestrator.store import Blob, Manifest

log = logging.getLogger(__name__)

IN_FLIGHT = 2
# Blobs that are fetched and verified at a time when a state is loaded.
FETCHES = 4
# How long rank 0 waits for the other ranks' shards of one checkpoint.
SHARD_SECONDS = 1800.0


@dataclass
class Snapshot:
    """A training state in host memory, and what its manifest will say."""

    key: str
    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    rows: tuple[Mapping[str, float], ...]
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    last: bool = False


class HostCopies:
    """Buffers that are filled again and again: fresh memory would cost a page fault per page in the training thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def fill(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return copies of `tensors` in host memory, valid until the next call with this prefix."""
        copies: dict[str, Tensor] = {}
        cuda = False
        for name, tensor in tensors.items():
            buffer = self._buffers.get(prefix + name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[prefix + name] = buffer
            cuda = cuda or tensor.is_cuda
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        return copies


def optimizer_name(rank: int, world_size: int) -> str:
    """Return the blob name of one rank's share of the optimizer."""
    return "optimizer.safetensors" if world_size == 1 else f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


class CheckpointWriter:
    """Writes, uploads and commits snapshots in one background thread, in order, at most two at a time."""

    def __init__(self) -> None:
        self._slots = [HostCopies() for _ in range(IN_FLIGHT)]
        self._free = threading.Semaphore(IN_FLIGHT)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    @property
    def busy(self) -> bool:
        """Whether two snapshots are in flight, so that another one would have to wait."""
        return sum(not future.done() for future in self._pending) >= IN_FLIGHT

    def check(self) -> None:
        """Raise what went wrong in the background."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Wait until everything is committed; raises what went wrong."""
        while self._pending:
            self._pending.pop(0).result()

    def submit(
        self, context: StageContext, work: TrainWork, engine: Engine, snapshot_of: Mapping[str, Any], *, last: bool
    ) -> None:
        """Copy the model and optimizer to host memory and hand them to the background.

        `snapshot_of` holds the fields of `Snapshot` besides the tensors. Waits while two snapshots are in flight.
        """
        self._free.acquire()
        slot = self._slots[0]
        self._slots.reverse()
        weights = engine.weights()
        snapshot = Snapshot(
            weights=slot.fill(weights, "weights/") if engine.rank == 0 else {},
            optimizer=slot.fill(engine.optimizer_tensors(), "optimizer/"),
            last=last,
            **snapshot_of,
        )
        self._pending.append(self._executor.submit(self._write, context, work, snapshot))

    def _write(self, context: StageContext, work: TrainWork, snapshot: Snapshot) -> None:
        try:
            folder = context.scratch / f"state-{snapshot.step}"
            folder.mkdir(parents=True, exist_ok=True)
            shard = folder / optimizer_name(context.rank, context.world_size)
            save_file(dict(snapshot.optimizer), shard)
            shard_blob = context.write_blob(shard.name, shard)
            shard.unlink()
            if context.rank > 0:
                _announce(context, snapshot.key, shard_blob)
                return
            weights = folder / "weights.safetensors"
            save_file(dict(snapshot.weights), weights)
            info = {**snapshot.info, "weights_sha256": tensors_sha256(snapshot.weights)}
            blobs = [
                context.write_blob(weights.name, weights),
                shard_blob,
                *_collect(context, snapshot.key),
                context.write_blob("state.json", json.dumps(snapshot.state).encode()),
                context.write_blob("series.json", json.dumps(snapshot.rows).encode()),
            ]
            weights.unlink()
            parents = {key: context.manifest(key).digest for key in work.parents.values()}
            context.commit_written(work, snapshot.key, tuple(blobs), snapshot.metrics, info, parents)
            log.info("%s: state at step %d committed", context.label, snapshot.step)
            if snapshot.last:
                context.release()
        finally:
            self._free.release()


def _announce(context: StageContext, key: str, blob: Blob) -> None:
    from jobs.train.distributed import meeting

    meeting().set(f"state/{key}/{context.rank}", json.dumps(asdict(blob)))


def _collect(context: StageContext, key: str) -> list[Blob]:
    """Return the other ranks' shards, waiting for them."""
    if context.world_size == 1:
        return []
    from datetime import timedelta

    from jobs.train.distributed import meeting

    names = [f"state/{key}/{rank}" for rank in range(1, context.world_size)]
    meeting().wait(names, timedelta(seconds=SHARD_SECONDS))
    return [Blob(**json.loads(meeting().get(name))) for name in names]


class Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files, each read when it is asked for: memory never holds all of them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._owners = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._owners[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def fetch_all(context: StageContext, manifest: Manifest) -> dict[str, Path]:
    """Return verified local files of every blob of a state by name, several fetched at a time; raises CorruptBlob."""
    names = [blob.name for blob in manifest.blobs]
    with ThreadPoolExecutor(FETCHES) as executor:
        paths = executor.map(lambda name: context.fetch(manifest.key, name), names)
        return dict(zip(names, paths, strict=True))


def load_optimizer(context: StageContext, manifest: Manifest, engine: Engine) -> None:
    """Fill the engine's optimizer from the shards of all ranks, tensor by tensor."""
    files = fetch_all(context, manifest)
    engine.load_optimizer(Shards(path for name, path in files.items() if name.startswith("optimizer")))
