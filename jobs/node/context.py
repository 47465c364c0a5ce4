"""What a stage sees of the world: its parents, its scratch space, its lease, and where its results go."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jobs.node import code, numerics
from jobs.node.cache import _is_whole, alone, cache_directory, prune_cache, stamp, use
from jobs.node.patience import patiently
from jobs.node.preemption import Signals
from jobs.node.provenance import provenance
from jobs.node.reporter import Reporter
from jobs.node.watchdog import Watchdog
from orchestrator.errors import ArtifactMissing, LeaseLost, StoreError
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.providers import uses_of
from orchestrator.spec.work import Work, work_to_json
from orchestrator.store import Blob, Manifest, Store

log = logging.getLogger(__name__)
T = TypeVar("T")

# Blobs of one artifact that are fetched and verified at a time.
FETCHES = 4


@dataclass
class Job:
    """What the stages of one process share.

    `live` carries a stage's objects (model, optimizer) to the next stage of the chain, `unsaved` says that no artifact
    holds all of them: a stop waits until the next stage has saved them. `finishers` are called after the
    last stage: they wait for what still goes on in the background.
    """

    store: Store
    attempt: str
    execution: Execution
    resources: Resources
    scratch: Path
    signals: Signals
    reporter: Reporter
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    live: dict[str, Any] = field(default_factory=dict)
    unsaved: bool = False
    todo: list[str] = field(default_factory=list)  # keys of the stages that this process has to make
    manifests: dict[str, Manifest] = field(default_factory=dict)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    watchdog: Watchdog = field(default_factory=Watchdog)


class StageContext:
    """One stage's view of its job. Safe to use from a background thread of the stage."""

    def __init__(self, job: Job, stage: str, label: str = "", *, moments: bool = True) -> None:
        """`moments`: something goes on from the state that the stage makes, so its optimizer's state is kept."""
        self.job = job
        self.stage = stage
        self.label = label
        self.moments = moments
        self.store = job.store
        self.attempt = job.attempt
        self.execution = job.execution
        self.resources = job.resources
        self.rank = job.rank
        self.world_size = job.world_size
        self.started = time.monotonic()
        self.scratch = job.scratch / stage[:16]
        self.scratch.mkdir(parents=True, exist_ok=True)

    @property
    def stopping(self) -> bool:
        """Whether a stop signal arrived: checkpoint, then raise `Preempted`."""
        return bool(self.job.signals.requested)

    @property
    def numerics(self) -> dict[str, Any]:
        """What decides the bits of this process's results besides their science."""
        return numerics.record(self.execution, self.resources, self.world_size)

    def check(self) -> None:
        """Raise LeaseLost when another attempt took this stage over (cheap: what the last renewal said)."""
        if self.rank == 0 and self.job.reporter.lease(self.stage) is None:
            raise LeaseLost(f"stage {self.stage[:12]} holds no lease")

    def manifest(self, key: str) -> Manifest:
        """Return the manifest of the artifact `key`; raises ArtifactMissing when there is none."""
        known = self.job.manifests.get(key)
        if known is not None:
            return known
        found = patiently(lambda: self.store.artifacts.get(key), f"manifest {key[:12]}")
        if found is None:
            raise ArtifactMissing(
                f"artifact {key[:12]} does not exist",
                cause=f"stage {self.label or self.stage[:12]} was started before its parent was committed",
                hint="run the grid again: the plan will make the parent first",
            )
        self.job.manifests[key] = found
        return found

    def fetch(self, key: str, name: str) -> Path:
        """Return a verified local file with the blob `name` of the artifact `key`. Do not write to it.

        Raises CorruptBlob when size or checksum is not what the manifest says.
        """
        known = self.job.files.get((key, name))
        if known is not None:
            return known
        manifest = self.manifest(key)
        blob = manifest.blob(name)
        path = self.store.objects.local_path(blob.path)
        if path is not None:
            patiently(lambda: self.store.artifacts.verify_blob(blob), f"blob {name}")
        else:
            path = self._cached(manifest, blob)
        self.job.files[key, name] = path
        return path

    def fetch_all(self, key: str, names: Iterable[str]) -> list[Path]:
        """Return verified local files of several blobs, some fetched at a time; raises CorruptBlob as `fetch` does."""
        with ThreadPoolExecutor(FETCHES) as executor:
            return list(executor.map(lambda name: self.fetch(key, name), names))

    def directory(self, key: str) -> Path:
        """Return a directory that holds every blob of the artifact `key` under its own name, verified."""
        target = self.job.scratch / "inputs" / key[:32]
        target.mkdir(parents=True, exist_ok=True)
        for blob in self.manifest(key).blobs:
            link = target / blob.name
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.fetch(key, blob.name).absolute())
        return target

    def _cached(self, manifest: Manifest, blob: Blob) -> Path:
        root = cache_directory()
        path = root / blob.sha256 / Path(blob.name).name
        while True:
            before = stamp(path)
            if _is_whole(path, blob) and use(path):
                return path
            with alone(root, blob):
                if stamp(path) == before:
                    return self._downloaded(manifest, blob, root, path)
            # Another process of this node has put it there meanwhile.

    def _downloaded(self, manifest: Manifest, blob: Blob, root: Path, path: Path) -> Path:
        """Download a blob to its place in the cache."""
        fresh = self.job.scratch / "downloads" / blob.sha256
        fresh.mkdir(parents=True, exist_ok=True)
        fetched = patiently(lambda: self.store.artifacts.fetch(manifest, blob.name, fresh), f"blob {blob.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        moving = path.parent / f".{os.getpid()}-{path.name}"
        shutil.move(fetched, moving)
        os.replace(moving, path)
        prune_cache(root, keep=path)
        return path

    def commit(
        self,
        work: Work,
        *,
        blobs: Mapping[str, Path | bytes],
        metrics: Mapping[str, float] | None = None,
        info: Mapping[str, object] | None = None,
        key: str | None = None,
        parents: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Upload `blobs` and commit the manifest of `key` (default: the work's own key); returns the winner's manifest.

        `parents` maps parent keys to the digests of their manifests (default: the work's parents as they are now).
        Raises LeaseLost when the stage belongs to another attempt, before and after the upload.
        """
        key = key or work.key()
        if parents is None:
            parents = {parent: self.manifest(parent).digest for parent in work.parents.values()}
        self.ensure_mine()
        written = [self.write_blob(name, source) for name, source in blobs.items()]
        # How long stages of this shape take calibrates the plan's estimates.
        told = {"seconds": round(time.monotonic() - self.started, 3), **(info or {})}
        return self.commit_written(work, key, tuple(written), metrics or {}, told, parents)

    def commit_written(
        self,
        work: Work,
        key: str,
        blobs: tuple[Blob, ...],
        metrics: Mapping[str, float],
        info: Mapping[str, object],
        parents: Mapping[str, str],
    ) -> Manifest:
        """Commit a manifest over blobs that are already in the store."""
        manifest = Manifest(
            key=key,
            kind=work.kind,
            spec=work_to_json(work),
            parents=dict(parents),
            numerics=numerics.of_stage(work.kind, self.execution, self.resources, self.world_size),
            provenance=provenance() | self._origins(work),
            attempt=self.attempt,
            generation=0,
            blobs=blobs,
            metrics=dict(metrics),
            info=dict(info),
            created=time.time(),
        )
        self.ensure_mine()
        committed = patiently(lambda: self.store.artifacts.commit(manifest), f"commit {key[:12]}")
        self.job.manifests[key] = committed
        for name in (blob.name for blob in committed.blobs):
            self.job.files.pop((key, name), None)
        self.job.reporter.beat(state=key)
        return committed

    def _origins(self, work: Work) -> dict[str, Any]:
        """Return what a manifest says of the training code, and of what came from outside."""
        uses = uses_of(work, self.execution.engine)
        found: dict[str, object] = {"plugins": [use.to_json() for use in uses]} if uses else {}
        if work.kind == "train":
            found["code"] = code.code_digest()
            if packages := code.package_digests(uses):
                found["package_code"] = packages
        return found

    def write_blob(self, name: str, source: Path | bytes) -> Blob:
        """Upload one blob of a manifest to come."""
        return patiently(lambda: self.store.artifacts.write_blob(self.attempt, name, source), f"upload {name}")

    def ensure_mine(self) -> None:
        """Ask the store whether this process still holds the stage; raises LeaseLost."""
        lease = self.job.reporter.lease(self.stage)
        if lease is None:
            raise LeaseLost(f"stage {self.stage[:12]} holds no lease")
        patiently(lambda: self.store.claims.check(lease), "lease check")

    def release(self, *, reopen: bool = False) -> None:
        """Give the lease back; `reopen` lets the same attempt start again. One that cannot be released expires."""
        release(self.job, self.stage, reopen=reopen)

    def series(self, step: int, metrics: Mapping[str, float], when: float | None = None) -> None:
        """Show one row of the live series; never waits for the store."""
        if self.rank == 0:
            self.job.reporter.series(self.stage, {"step": step, "time": when or time.time(), **metrics})

    def progress(self, step: int, total: int, **values: object) -> None:
        """Say in the heartbeat how far the stage is (`loss`, `tokens_per_second`, ...)."""
        self.job.reporter.beat(
            stage=self.stage, label=self.label, step=step, total=total, stopping=self.stopping, **values
        )


def release(job: Job, stage: str, *, reopen: bool = False) -> None:
    """Give the lease of `stage` back, if it is still held."""
    try:
        lease = job.reporter.lease(stage)
        if lease is not None:
            job.reporter.drop(stage)
            job.store.claims.release(lease, reopen=reopen)
    except (LeaseLost, StoreError) as error:
        log.warning("lease of %s not released: %s", stage[:12], error.error)
