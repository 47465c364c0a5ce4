"""What a running evaluation has already scored, chunk by chunk, so that a killed one goes on where it was.

`partial/<stage>/<chunk>.json` is put-if-absent: an item is scored once, whoever scores it. The ranks of a job take
chunks in turn and read each other's from here. A chunk is computed by one rank alone, so that results do not depend on
the number of ranks. The committed artifact is the truth; these objects are deleted after the commit and may be deleted
at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.node.patience import patiently
from orchestrator.errors import StoreError

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork, GenerateWork, JudgeWork

    Measuring = EvaluateWork | GenerateWork | JudgeWork

log = logging.getLogger(__name__)

# A chunk's name, and what computes its JSON value.
Part = tuple[str, Callable[[], Any]]


class Ledger:
    """The scored chunks of one evaluation stage. Every rank of the job makes the same calls in the same order."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._objects = context.store.objects
        self._prefix = f"partial/{context.stage}"
        self._known = {entry.path for entry in patiently(self._list, "list of scored chunks")}
        self._calls = 0
        self.reused = 0

    def scored(self, parts: Sequence[Part], progress: Callable[[int], None] = lambda done: None) -> list[Any]:
        """Return the JSON value of every part, in order: what was stored, else what some rank computes and stores.

        `progress` is told how many parts have been dealt with.
        """
        if self._context.world_size == 1:
            values = []
            for number, part in enumerate(parts):
                values.append(self._once(*part))
                progress(number + 1)
            return values
        from jobs.node.ranks import meet, turns

        rank, size, check = self._context.rank, self._context.world_size, self._context.job.signals.check
        call = f"{self._context.stage}/{self._calls}"
        self._calls += 1
        mine: dict[int, object] = {}
        for number in turns(call, len(parts), size):
            mine[number] = self._once(*parts[number])
            progress(number + 1)
        meet(f"{call}/scored", rank, size, check)
        values = [mine[number] if number in mine else self._read(name) for number, (name, _) in enumerate(parts)]
        meet(f"{call}/read", rank, size, check)
        return values

    def commit(
        self, work: Measuring, *, blobs: Mapping[str, bytes], metrics: Mapping[str, float], info: Mapping[str, object]
    ) -> None:
        """Commit the evaluation (rank 0 alone) and delete its chunks."""
        if self._context.rank:
            return
        told = {**info, "chunks_reused": self.reused}
        self._context.commit(work, blobs=blobs, metrics=metrics, info=told)
        with contextlib.suppress(StoreError):  # what stays is swept by gc
            for entry in list(self._list()):
                self._objects.delete(entry.path)

    def _list(self) -> list[Any]:
        return list(self._objects.list(f"{self._prefix}/"))

    def _path(self, chunk: str) -> str:
        return f"{self._prefix}/{chunk}.json"

    def _get(self, chunk: str) -> bytes | None:
        """Return the chunk as it was stored, None if it is absent; one that was damaged is deleted first."""
        stored = patiently(lambda: self._objects.get(self._path(chunk)), f"chunk {chunk}")
        if stored is None:
            return None
        try:
            json.loads(stored)
        except ValueError:
            log.warning("chunk %s is damaged: it is scored again", chunk)
            patiently(lambda: self._objects.delete(self._path(chunk)), f"chunk {chunk}")
            return None
        return stored

    def _read(self, chunk: str) -> Any:
        stored = self._get(chunk)
        if stored is None:
            raise StoreError(
                f"cannot read {self._path(chunk)} in {self._context.store.url}",
                cause="it was scored, and is damaged or gone since",
                hint="moegrid resume scores it again",
            )
        return json.loads(stored)

    def _once(self, chunk: str, compute: Callable[[], Any]) -> Any:
        stored = self._get(chunk) if self._path(chunk) in self._known else None
        if stored is not None:
            self.reused += 1
            return json.loads(stored)
        body = json.dumps(compute())
        self._context.check()
        while not patiently(lambda: self._objects.create(self._path(chunk), body.encode()), f"chunk {chunk}"):
            if (winner := self._get(chunk)) is not None:
                return json.loads(winner)
        log.info("scored %s", chunk)
        return json.loads(body)
