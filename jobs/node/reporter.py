"""The background thread of a node: heartbeat, lease renewal, live series and log; never in the way of a step.

Everything it writes except the leases is advisory. When the store is away it keeps what it has and tries again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from typing import Any

from jobs.node.logs import LogFile
from orchestrator.errors import LeaseLost, StoreError
from orchestrator.store import Lease, Store
from orchestrator.store.attempts import heartbeat_path, log_path, series_folder

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
SERIES_SECONDS = 2.0
LOG_SECONDS = 3.0
TICK_SECONDS = 0.25
SERIES_KEPT = 100_000  # rows held back while the store is away


class Reporter:
    """Tells the store what this process does, from a thread of its own."""

    def __init__(self, store: Store, attempt: str, rank: int = 0, log_file: LogFile | None = None) -> None:
        self._store = store
        self._attempt = attempt
        self._rank = rank
        self._log_file = log_file
        self._log_size = -1
        self._lock = threading.Lock()
        self._beat: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "rank": rank, "stopping": False}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._sequence: int | None = None
        self._leases: dict[str, Lease] = {}
        self._renewed: dict[str, float] = {}
        self._lost: dict[str, LeaseLost] = {}
        self._due = {"heartbeat": 0.0, "series": 0.0, "log": 0.0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def hold(self, lease: Lease) -> None:
        """Renew `lease` from now on."""
        with self._lock:
            self._leases[lease.stage] = lease
            self._renewed[lease.stage] = time.monotonic()

    def drop(self, stage: str) -> Lease | None:
        """Stop renewing the lease of `stage` and return it."""
        with self._lock:
            return self._leases.pop(stage, None)

    def lease(self, stage: str) -> Lease | None:
        """Return the lease of `stage` as last renewed; raises LeaseLost when a renewal said so."""
        with self._lock:
            if stage in self._lost:
                raise self._lost[stage]
            return self._leases.get(stage)

    def held(self) -> list[str]:
        """Return the stages whose leases are held."""
        with self._lock:
            return list(self._leases)

    def beat(self, **values: object) -> None:
        """Change what the next heartbeat says."""
        with self._lock:
            self._beat.update(values)

    def series(self, stage: str, row: dict[str, Any]) -> None:
        """Queue one row of `stage`'s live series."""
        with self._lock:
            rows = self._rows.setdefault(stage, [])
            rows.append(row)
            del rows[:-SERIES_KEPT]

    def close(self) -> None:
        """Stop the thread and write what is left."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self._due = dict.fromkeys(self._due, 0.0)
        self._report()

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            self._renew()
            self._report()

    def _renew(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [lease for stage, lease in self._leases.items() if now - self._renewed[stage] > lease.ttl / 4]
        for lease in due:
            try:
                self._store.claims.renew(lease)
            except LeaseLost as error:
                with self._lock:
                    self._lost[lease.stage] = error
                    self._leases.pop(lease.stage, None)
                log.warning("lease of stage %s lost", lease.stage[:12])
                continue
            except StoreError as error:
                log.warning("lease of stage %s not renewed: %s", lease.stage[:12], error.error)
                continue
            with self._lock:
                self._renewed[lease.stage] = now

    def _report(self) -> None:
        now = time.monotonic()
        if self._log_file is not None:
            self._log_file.forward()
        for name, period, write in (
            ("heartbeat", HEARTBEAT_SECONDS, self._write_heartbeat),
            ("series", SERIES_SECONDS, self._write_series),
            ("log", LOG_SECONDS, self._write_log),
        ):
            if now >= self._due[name]:
                self._due[name] = now + period
                try:
                    write()
                except StoreError:
                    # Logging it each time would grow the log that cannot be shipped.
                    self._due[name] = now + 5 * period

    def _write_heartbeat(self) -> None:
        with self._lock:
            record = {"time": time.time(), **self._beat}
        self._store.objects.put(heartbeat_path(self._attempt, self._rank), json.dumps(record).encode())

    def _write_series(self) -> None:
        with self._lock:
            pending = {stage: list(rows) for stage, rows in self._rows.items() if rows}
        folder = series_folder(self._attempt)
        for stage, rows in pending.items():
            if self._sequence is None:
                self._sequence = sum(1 for _ in self._store.objects.list(folder))
            body = json.dumps({"stage": stage, "rows": rows}).encode()
            while not self._store.objects.create(f"{folder}{self._sequence:06d}.json", body):
                self._sequence += 1
            self._sequence += 1
            with self._lock:
                del self._rows[stage][: len(rows)]

    def _write_log(self) -> None:
        if self._log_file is None or self._log_file.size() == self._log_size:
            return
        size = self._log_file.size()
        self._store.objects.put(log_path(self._attempt, self._rank), self._log_file.read())
        self._log_size = size
