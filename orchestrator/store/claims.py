"""Leases on stages: who may work on a stage and commit it.

Truth: `claims/<stage>.json`, changed by compare-and-swap alone and never deleted, so fencing tokens only grow. A lease
lives while the object's age, by the store's clock, is below its time to live. Every change writes a new nonce, because
a store's version of equal bytes may be equal.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.errors import LeaseLost
from orchestrator.store.objects import Object, Objects

FOLDER = "claims"


@dataclass(frozen=True, slots=True)
class Lease:
    """A fencing token of one stage, held by one attempt; `ttl` in seconds."""

    stage: str
    attempt: str
    token: int
    nonce: str
    ttl: float


@dataclass(frozen=True, slots=True)
class ClaimState:
    """A claim as it stands; `age` is seconds since its last renewal, by the store's clock."""

    attempt: str
    token: int
    live: bool
    entered: bool
    age: float
    released: bool = False
    ttl: float = 0.0
    modified: float = 0.0

    def at(self, now: float) -> ClaimState:
        """Return the same claim at another time of the store's clock."""
        live = not self.released and now - self.modified < self.ttl
        return replace(self, live=live, age=max(0.0, now - self.modified))


# A store's time can have whole seconds: a claim younger than this when it was read may have changed since.
_SETTLED_SECONDS = 3.0


class Claims:
    """Claiming, entering, renewing and releasing stages."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._seen: dict[str, ClaimState] = {}  # by `of`; `modified` is that of the listing

    def claim(self, stage: str, attempt: str, ttl: float) -> Lease | None:
        """Take the stage for `attempt`; None if another attempt holds a live lease.

        A lease that has expired or was released is taken over with the next token. The holder's own attempt gets its
        present lease again, so that a driver that died after the claim can go on.
        """
        first = Lease(stage, attempt, 1, secrets.token_hex(8), ttl)
        if self._objects.create(_path(stage), _body(first)):
            return first
        while (found := self._objects.read(_path(stage))) is not None:
            body = _parse(found.data)
            if self._live(found, body):
                return _lease(stage, body) if body["attempt"] == attempt else None
            lease = Lease(stage, attempt, int(body["token"]) + 1, secrets.token_hex(8), ttl)
            if self._objects.replace(_path(stage), _body(lease), found.version):
                return lease
        return self.claim(stage, attempt, ttl)

    def enter(self, stage: str, attempt: str) -> Lease:
        """Begin work on a claimed stage in this process: the next token, or LeaseLost.

        Of all the processes of an attempt (a scheduler can start a job twice) exactly one enters a claim. A lease that
        ran out while the job was queued is still the attempt's own until another one takes it.
        """
        found = self._objects.read(_path(stage))
        body = _parse(found.data) if found else {}
        if found is None or body["attempt"] != attempt:
            raise _lost(stage, attempt, f"it belongs to {body['attempt']}" if body else "nobody claimed it")
        if body["entered"]:
            raise _lost(stage, attempt, "another process of this attempt works or worked on it")
        lease = Lease(stage, attempt, int(body["token"]) + 1, secrets.token_hex(8), float(body["ttl"]))
        if not self._objects.replace(_path(stage), _body(lease, entered=lease.nonce), found.version):
            raise _lost(stage, attempt, "another process took it at this moment")
        return lease

    def renew(self, lease: Lease) -> None:
        """Make the lease young again; LeaseLost if it is not this process's any more."""
        self._swap(lease)

    def check(self, lease: Lease) -> None:
        """LeaseLost unless the stage's claim is still exactly this lease, though it may be overdue."""
        self._mine(lease)

    def release(self, lease: Lease, *, reopen: bool = False) -> None:
        """Give the stage up for others to claim; nothing if it is lost already.

        `reopen` lets a process of the same attempt enter again (a scheduler that restarts a preempted job).
        """
        try:
            self._swap(lease, released=True, **({"entered": ""} if reopen else {}))
        except LeaseLost:
            return

    def evict(self, stage: str, attempt: str) -> None:
        """Release a claim whose attempt is known to be over; nothing if it is released, another's or damaged."""
        found = self._objects.read(_path(stage))
        body = _parse(found.data) if found else {}
        if body and body["attempt"] == attempt and not body["released"]:
            self.release(_lease(stage, body))

    def states(self, stages: Iterable[str] | None = None) -> dict[str, ClaimState]:
        """Return the claims of `stages` (None: of all) that exist."""
        if stages is None:
            cut = len(FOLDER) + 1
            stages = [entry.path[cut:-5] for entry in self._objects.list(FOLDER)]
        names = list(stages)
        if not names:
            return {}
        now = self._objects.now()
        found_all = self._objects.parallel(lambda stage: self._objects.read(_path(stage)), names)
        states = {}
        for stage, found in zip(names, found_all, strict=True):
            if found is not None:
                body = _parse(found.data)
                states[stage] = ClaimState(
                    attempt=body["attempt"],
                    token=int(body["token"]),
                    live=self._live(found, body, now),
                    entered=bool(body["entered"]),
                    age=max(0.0, now - found.modified),
                    released=bool(body["released"]),
                    ttl=float(body["ttl"]),
                    modified=found.modified,
                )
        return states

    def claimed(self, stages: Collection[str]) -> set[str]:
        """Return those of `stages` that somebody ever claimed; one listing."""
        cut = len(FOLDER) + 1
        return {stage for entry in self._objects.list(FOLDER) if (stage := entry.path[cut:-5]) in stages}

    def of(self, stages: Collection[str]) -> dict[str, ClaimState]:
        """Return the claims of `stages` that exist: one listing, and one read for each that changed since the last."""
        cut = len(FOLDER) + 1
        changed, listed = {}, []
        for entry in self._objects.list(FOLDER):
            stage = entry.path[cut:-5]
            if stage not in stages:
                continue
            listed.append(stage)
            known = self._seen.get(stage)
            if known is None or known.modified != entry.modified:
                changed[stage] = entry.modified
        if not listed:
            return {}
        now = self._objects.now()
        fresh = self.states(changed)
        found = {}
        for stage in listed:
            if stage not in changed:
                found[stage] = self._seen[stage].at(now)
            elif stage in fresh:
                found[stage] = fresh[stage]
                self._seen.pop(stage, None)
                if now - changed[stage] > _SETTLED_SECONDS:
                    self._seen[stage] = replace(fresh[stage], modified=changed[stage])
        return found

    def claim_many(self, wanted: Sequence[tuple[str, str]], ttl: float) -> Sequence[Lease | None]:
        """Claim (stage, attempt) pairs concurrently; results in order."""
        return self._objects.parallel(lambda pair: self.claim(pair[0], pair[1], ttl), wanted)

    def _live(self, found: Object, body: dict[str, Any], now: float | None = None) -> bool:
        if body["released"]:
            return False
        return (self._objects.now() if now is None else now) - found.modified < float(body["ttl"])

    def _mine(self, lease: Lease) -> tuple[Object, dict[str, Any]]:
        found = self._objects.read(_path(lease.stage))
        if found is None:
            raise _lost(lease.stage, lease.attempt, "its claim is gone")
        body = _parse(found.data)
        if (body["token"], body["nonce"]) != (lease.token, lease.nonce):
            held = f"{body['attempt']} holds token {body['token']}, newer than {lease.token}"
            raise _lost(lease.stage, lease.attempt, held)
        if body["released"]:
            raise _lost(lease.stage, lease.attempt, "it was released")
        return found, body

    def _swap(self, lease: Lease, **changes: object) -> None:
        while True:
            found, body = self._mine(lease)
            body |= {**changes, "beat": secrets.token_hex(4)}
            if self._objects.replace(_path(lease.stage), json.dumps(body).encode(), found.version):
                return


def _path(stage: str) -> str:
    return f"{FOLDER}/{stage}.json"


def _body(lease: Lease, *, entered: str = "") -> bytes:
    return json.dumps(
        {
            "stage": lease.stage,
            "attempt": lease.attempt,
            "token": lease.token,
            "nonce": lease.nonce,
            "ttl": lease.ttl,
            "released": False,
            "entered": entered,
            "beat": "",
        }
    ).encode()


# The fields of a claim that are read, with their types.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "attempt": str,
    "token": int,
    "nonce": str,
    "ttl": (int, float),
    "released": bool,
    "entered": str,
}


def _parse(data: bytes) -> dict[str, Any]:
    """A claim's fields; one that is damaged counts as released, for leases are told apart by their nonces."""
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if isinstance(body, dict) and all(isinstance(body.get(name), kind) for name, kind in _FIELDS.items()):
        return dict(body)
    return {"attempt": "", "token": 0, "nonce": "", "ttl": 0.0, "released": True, "entered": "unknown"}


def _lease(stage: str, body: dict[str, Any]) -> Lease:
    return Lease(stage, body["attempt"], int(body["token"]), body["nonce"], float(body["ttl"]))


def _lost(stage: str, attempt: str, cause: str) -> LeaseLost:
    return LeaseLost(
        f"attempt {attempt} does not hold stage {stage[:12]} any more",
        cause=cause,
        hint="nothing is lost: the holder carries on, and its result is the one that counts",
    )
