"""Whose turn it is to write to a tracker: one leased publisher at a time, or series would be told twice."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid

from orchestrator.errors import LeaseLost, StoreError
from orchestrator.store import Store
from orchestrator.store.claims import Lease

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Turn:
    """The lease that lets one publisher at a time write to one tracker; renewed by a thread while it is held."""

    def __init__(self, store: Store, tracking_uri: str) -> None:
        self.name = f"tracker-{short_digest(tracking_uri)}"
        self._claims = store.claims
        self._owner = f"publisher-{uuid.uuid4().hex[:12]}"
        self._lease: Lease | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._lease is not None:
            try:
                self._claims.release(self._lease)
            except StoreError as error:
                log.warning("the publisher's lease runs out by itself: %s", error.error)

    def wait(self, seconds: float) -> bool:
        """Return whether this publisher has the lease, after waiting up to `seconds` for it."""
        deadline = time.monotonic() + seconds
        while self._lease is None:
            self._lease = self._claims.claim(self.name, self._owner, LEASE_SECONDS)
            if self._lease is None:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.5)
            elif self._thread is None:
                self._thread = threading.Thread(target=self._renew, daemon=True)
                self._thread.start()
        return True

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            lease = self._lease
            if lease is None:
                continue
            try:
                self._claims.renew(lease)
            except StoreError:
                continue
            except LeaseLost:
                self._lease = None
