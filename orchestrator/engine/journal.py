"""What the engine writes down and reads again: submissions, handles, failures, pardons. All of it is in the store.

`submissions/<batch>.json` (immutable) says what a batch was asked to run; `attempts/<attempt>/handle.json` how the
scheduler calls it; `failures/<stage>/<attempt>.json` (immutable) why an attempt did not finish a stage, and
`failures/<stage>/<attempt>.pardon` that a person asked to try again. What is immutable is read once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator import registry
from orchestrator.backends.base import Handle
from orchestrator.engine.retry import decide
from orchestrator.resources import ROOT
from orchestrator.store import ClaimState, Store
from orchestrator.store.attempts import (
    Failure,
    Heartbeat,
    PlannedJob,
    Submission,
    batch_of,
    failure_path,
    handle_path,
    heartbeat_path,
    log_path,
    pardon_path,
    report_path,
    submission_path,
)

LOG_BYTES = 256 * 1024


class Journal:
    """The engine's memory, kept in the store; what it caches is immutable."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._submissions: dict[str, Submission] = {}
        self._handles: dict[str, Handle] = {}
        self._failures: dict[str, dict[str, Failure]] = {}
        self._pardons: set[tuple[str, str]] = set()
        self.recorded: set[str] = set()  # attempts that have a failure written down

    def claims(self, stages: Collection[str]) -> dict[str, ClaimState]:
        """Return the claims of `stages`: one listing, and one read for each claim that changed."""
        return self.store.claims.of(stages)

    def evict(self, stage: str, attempt: str) -> None:
        """Release a claim whose attempt is known to be over; nothing if it changed hands meanwhile."""
        self.store.claims.evict(stage, attempt)

    def submit(self, submission: Submission) -> None:
        """Write down what a batch will be asked to run, before the scheduler hears of it."""
        self.store.create_json(submission_path(submission.batch), submission.to_json())
        self._submissions[submission.batch] = submission

    def submission(self, batch: str) -> Submission | None:
        """Return what a batch was asked to run; None when that was never written down, or is damaged."""
        if batch not in self._submissions:
            found = self.store.find_json(submission_path(batch))
            try:
                self._submissions[batch] = Submission.parse(found or {})
            except ValueError:
                return None
        return self._submissions[batch]

    def site(self, attempt: str) -> str:
        """Return the site an attempt was submitted to, "" when nobody wrote it down."""
        submission = self.submission(batch_of(attempt))
        return submission.site if submission else ""

    def job(self, attempt: str) -> PlannedJob | None:
        """Return the job that an attempt was to run."""
        submission = self.submission(batch_of(attempt))
        return submission.job(attempt) if submission else None

    def record_handles(self, handles: Iterable[Handle]) -> None:
        """Write down how the scheduler calls its jobs."""
        for handle in handles:
            self._handles[handle.attempt] = handle
            self.store.put_json(handle_path(handle.attempt), handle.to_json())

    def handle(self, attempt: str) -> Handle | None:
        """Return how the scheduler calls an attempt, if that was written down."""
        if attempt not in self._handles:
            found = self.store.find_json(handle_path(attempt))
            handle = None if found is None else Handle.parse(found)
            if handle is None:
                return None
            self._handles[attempt] = handle
        return self._handles[attempt]

    def heartbeat(self, attempt: str) -> Heartbeat | None:
        """Return the last heartbeat of an attempt, None before the first."""
        beat = self.store.find_json(heartbeat_path(attempt))
        return Heartbeat.parse(beat) if beat else None

    def report(self, attempt: str) -> dict[str, Any] | None:
        """Return the node's own `failure.json`."""
        return self.store.find_json(report_path(attempt))

    def log(self, attempt: str, path: Path | None) -> str:
        """Return the end of an attempt's log: from this machine's file, else as the node shipped it."""
        data = b""
        if path is not None:
            try:
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - LOG_BYTES))
                    data = file.read()
            except OSError:
                data = b""
        return (data or self.store.objects.get(log_path(attempt)) or b"").decode(errors="replace")

    def record_failure(self, failure: Failure, log: str) -> None:
        """Write down, once, why an attempt did not finish a stage; the node's report and log too if it left none."""
        self.store.create_json(failure_path(failure.stage, failure.attempt), failure.to_json())
        report = {name: getattr(failure, name) for name in ("stage", "kind", "message", "hint", "exit_code")}
        self.store.create_json(report_path(failure.attempt), {**report, "traceback": failure.tail})
        if log:
            self.store.objects.create(log_path(failure.attempt), log.encode())

    def failures(self, stages: Collection[str]) -> dict[str, list[Failure]]:
        """Return the failures of `stages` that are not pardoned, oldest first; one listing."""
        for entry in self.store.objects.list("failures"):
            _, stage, name = entry.path.split("/")
            attempt, _, kind = name.rpartition(".")
            self.recorded.add(attempt)
            if kind == "pardon":
                self._pardons.add((stage, attempt))
            elif stage in stages and attempt not in self._failures.get(stage, {}):
                # Of a record that is damaged the node's own is left.
                for found in (self.store.find_json(entry.path), self.report(attempt)):
                    failure = Failure.parse({**(found or {}), "stage": stage, "attempt": attempt})
                    if failure is not None:
                        break
                if failure is not None:
                    # The store's clock orders the failures of several drivers.
                    self._failures.setdefault(stage, {})[attempt] = replace(failure, time=entry.modified)
        result = {}
        for stage, known in self._failures.items():
            kept = [f for f in known.values() if (stage, f.attempt) not in self._pardons]
            if kept and stage in stages:
                result[stage] = sorted(kept, key=lambda failure: failure.time)
        return result

    def given_up(self, stages: Collection[str]) -> dict[str, str]:
        """Return stage -> reason of those of `stages` that no run tries again by itself."""
        decisions = {stage: decide(own) for stage, own in self.failures(stages).items()}
        return {stage: decision.reason for stage, decision in decisions.items() if not decision.retry}

    def knows_failures(self, stage: str) -> bool:
        """Has no driver written down a failure of `stage` since they were last read?"""
        known = self._failures.get(stage, {})
        names = (entry.path.rsplit("/", 1)[1] for entry in self.store.objects.list(f"failures/{stage}"))
        return all(name.endswith(".pardon") or name.removesuffix(".json") in known for name in names)

    def attempts(self, stage: str) -> int:
        """Return how many attempts at a stage have failed, pardoned ones included."""
        return len(self._failures.get(stage, {}))

    def pardon(self, failures: Iterable[Failure]) -> None:
        """Let these failures count no more."""
        for failure in failures:
            self.store.create_json(pardon_path(failure.stage, failure.attempt), {})
            self._pardons.add((failure.stage, failure.attempt))


def code_digest() -> str:
    """Return a digest of the code that decides a result, ours and that of packages in use."""
    packages = sorted({str(origin) for _, _, origin in registry.in_use() if not origin.file})
    return hashlib.sha256("\n".join((_own_code(), *packages)).encode()).hexdigest() if packages else _own_code()


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Return a digest of our code, the same in every clone of one version."""
    digest = hashlib.sha256()
    for folder in ("jobs", "orchestrator/spec", "orchestrator/store"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(json.dumps(str(path.relative_to(ROOT))).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
