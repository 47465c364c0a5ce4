"""States to and from the store: the training thread pays one copy to host memory, the rest happens in the background.

Blobs of a state: `weights.safetensors` and `optimizer.safetensors` (of several ranks: one shard each), `state.json`
(where training stood), `series.json` (the segment's logged rows, each step once) and `tensors.json`. Of several ranks
what every one reads (buffers, step counts) lies apart in small files, `weights-shared-...` and `optimizer-shared-...`,
and `files.json` says what each file holds, so that a rank which goes on fetches its own and these alone. The manifest
says whether the optimizer's state is there (`info.moments`): where nothing goes on from a state it is not written.
Weights that did not change since the parent state are not written either (`jobs.train.kept`).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import LifoQueue
from typing import Any

import torch
from torch import Tensor

from jobs.models.shards import (
    Layout,
    Rows,
    digest_text,
    layout_of,
    layouts_from_json,
    layouts_to_json,
    shard_name,
    write_pieces,
)
from jobs.node.context import StageContext
from jobs.train.engine import Engine
from jobs.train.kept import agreed, described, to_json
from orchestrator.spec.work import TrainWork
from orchestrator.store import Blob
from orchestrator.store.manifest import FILES, MOMENTS, TENSORS, WEIGHTS

log = logging.getLogger(__name__)

IN_FLIGHT = 2
# Of states whose share is larger than this, one at a time: host memory holds each rank's share once.
SMALL_BYTES = 64 << 20
# How long rank 0 waits for the other ranks' shards of one checkpoint.
SHARD_SECONDS = 1800.0


@dataclass(frozen=True)
class Snapshot:
    """A training state in host memory, and what its manifest will say: nothing of it is the training thread's own."""

    key: str
    step: int
    weights: Mapping[str, Rows]
    optimizer: Mapping[str, Rows] | None  # None: the state is kept without
    state: bytes  # state.json
    series: bytes  # series.json
    info: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank wrote of a state: its files with weights, those with the optimizer's state, what each holds."""

    weights: tuple[Blob, ...]
    optimizer: tuple[Blob, ...]
    layouts: Mapping[str, Layout]

    @classmethod
    def parse(cls, text: bytes | str) -> Share:
        """Rebuild what `to_json` wrote."""
        weights, optimizer, layouts = json.loads(text)
        own = tuple(Blob(**blob) for blob in weights)
        return cls(own, tuple(Blob(**blob) for blob in optimizer), layouts_from_json(layouts))

    def to_json(self) -> str:
        """Return the share as text for rank 0."""
        blobs = [[asdict(blob) for blob in own] for own in (self.weights, self.optimizer)]
        return json.dumps([*blobs, layouts_to_json(self.layouts)])


class HostCopies:
    """Buffers that are filled again and again: fresh memory would cost a page fault per page in the training thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def fill(self, pieces: Iterable[tuple[str, Rows]], prefix: str) -> dict[str, Rows]:
        """Return copies of `pieces` in host memory, valid until the next call with this prefix."""
        copies: dict[str, Rows] = {}
        cuda = False
        for name, piece in pieces:
            tensor, dtype = piece.tensor, piece.written
            buffer = self._buffers.get(prefix + name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != dtype:
                buffer = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
                self._buffers[prefix + name] = buffer
            cuda = cuda or tensor.is_cuda
            copies[name] = replace(piece, tensor=buffer.copy_(tensor.detach(), non_blocking=True))
        if cuda:
            torch.cuda.synchronize()
        return copies


class CheckpointWriter:
    """Writes, uploads and commits snapshots in one background thread: at most two at a time, of large ones one."""

    def __init__(self) -> None:
        # The slot freed last is taken first: the second costs memory only once two snapshots are in flight.
        self._free: LifoQueue[HostCopies] = LifoQueue()
        for _ in range(IN_FLIGHT):
            self._free.put(HostCopies())
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._bytes = 0  # of the last snapshot

    @property
    def busy(self) -> bool:
        """Whether as many snapshots are in flight as may be, so that another one would have to wait."""
        return sum(not future.done() for future in self._pending) >= self._limit

    @property
    def _limit(self) -> int:
        return IN_FLIGHT if self._bytes <= SMALL_BYTES else 1

    def check(self) -> None:
        """Raise what went wrong in the background."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Wait until everything is committed; raises what went wrong."""
        while self._pending:
            self._pending.pop(0).result()

    def submit(
        self,
        context: StageContext,
        work: TrainWork,
        engine: Engine,
        step: int,
        state: Mapping[str, object],
        rows: Sequence[str],
        *,
        info: Mapping[str, object],
        metrics: Mapping[str, float],
        last: bool,
    ) -> None:
        """Copy the state at `step` to host memory and hand the copy to the background.

        `rows` are the segment's logged rows, each as JSON. Waits while as many snapshots are in flight as may be.
        """
        if self._limit == 1:
            self.wait()
        slot = self._free.get()
        optimizer = None
        weights = slot.fill(engine.weights(), "weights/")
        if info[MOMENTS]:
            optimizer = slot.fill(engine.optimizer_tensors().items(), "optimizer/")
        snapshot = Snapshot(
            key=work.key_at(step),
            step=step,
            weights=weights,
            optimizer=optimizer,
            state=json.dumps(state).encode(),
            series=f"[{', '.join(rows)}]".encode(),
            info=copy.deepcopy(dict(info)),
            metrics=dict(metrics),
            last=last,
        )
        self._bytes = sum(piece.tensor.nbytes for piece in snapshot.weights.values())
        self._bytes += sum(piece.tensor.nbytes for piece in (optimizer or {}).values())
        self._pending.append(self._executor.submit(self._write, context, work, snapshot, slot))

    def _write(self, context: StageContext, work: TrainWork, snapshot: Snapshot, slot: HostCopies) -> None:
        try:
            folder = context.scratch / f"state-{snapshot.step}"
            folder.mkdir(parents=True, exist_ok=True)
            pieces = snapshot.weights
            kept, tensors = agreed(context, snapshot.key, work.parent, described(pieces), SHARD_SECONDS)
            own = {name: piece for name, piece in pieces.items() if name not in kept.owners}
            layouts: dict[str, Layout] = {}
            written = self._upload(context, folder, "weights", own, layouts)
            moments = snapshot.optimizer
            optimizer = () if moments is None else self._upload(context, folder, "optimizer", moments, layouts)
            share = Share(written, optimizer, layouts)
            if context.rank > 0:
                _announce(context, snapshot.key, share)
                return
            shares = [share, *_collect(context, snapshot.key)]
            info = {**snapshot.info, WEIGHTS: digest_text(one.digest for one in tensors.values())}
            blobs = [
                *(blob for one in shares for blob in one.weights),
                *kept.blobs,
                *(blob for one in shares for blob in one.optimizer),
                context.write_blob("state.json", snapshot.state),
                context.write_blob("series.json", snapshot.series),
                context.write_blob(TENSORS, to_json(tensors).encode()),
            ]
            if len(shares) > 1:
                held = dict(kept.layouts)
                for one in shares:
                    held |= one.layouts
                blobs.append(context.write_blob(FILES, layouts_to_json(held).encode()))
            parents = {key: context.manifest(key).digest for key in work.parents.values()}
            context.commit_written(work, snapshot.key, tuple(blobs), snapshot.metrics, info, parents)
            log.info("%s: state at step %d committed", context.label, snapshot.step)
            if snapshot.last:
                context.release()
        finally:
            self._free.put(slot)

    def _upload(
        self, context: StageContext, folder: Path, kind: str, pieces: Mapping[str, Rows], layouts: dict[str, Layout]
    ) -> tuple[Blob, ...]:
        """Write this rank's pieces, those apart that every rank reads; note in `layouts` what each file holds."""
        several = context.world_size > 1
        shared = {name: piece for name, piece in pieces.items() if piece.shared and several}
        own = {name: piece for name, piece in pieces.items() if name not in shared}
        blobs = []
        for what, held in ((kind, own), (f"{kind}-shared", shared)):
            if what == kind or held:
                path = folder / shard_name(what, context.rank, context.world_size)
                write_pieces(held, path)
                layouts[path.name] = layout_of(path)
                blobs.append(context.write_blob(path.name, path))
                path.unlink()
        return tuple(blobs)


def _announce(context: StageContext, key: str, share: Share) -> None:
    from jobs.node.ranks import meeting

    meeting().set(f"state/{key}/{context.rank}", share.to_json())


def _collect(context: StageContext, key: str) -> list[Share]:
    """Return the other ranks' shares, waiting for them."""
    if context.world_size == 1:
        return []
    from jobs.node.ranks import told

    names = [f"state/{key}/{rank}" for rank in range(1, context.world_size)]
    return [Share.parse(said) for said in told(names, SHARD_SECONDS)]
