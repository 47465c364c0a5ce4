"""Objects in a folder, in memory or in an S3 bucket: the few operations that everything in the store is made of.

`create` (put-if-absent) and `replace` (compare-and-swap) are atomic across processes and hosts; they are what
commits and leases stand on. `put` overwrites and is for advisory objects alone (heartbeats, live series).
Two different writes of one object must differ in their bytes (put a nonce in): on S3 a version is an ETag, and
equal bytes have equal ETags.
"""

from __future__ import annotations

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.errors import StoreError

T = TypeVar("T")
R = TypeVar("R")

# How long an unreachable store is retried before an operation gives up, seconds.
PATIENCE = 30.0
_CLOCK_LIFE = 300.0
_SEGMENT = re.compile(r"[A-Za-z0-9_=+@,-][A-Za-z0-9._=+@,-]*")
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object; `modified` is seconds since the epoch by the store's clock."""

    path: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Object:
    """An object's bytes, the version that `replace` compares, and its last change by the store's clock."""

    data: bytes
    version: str
    modified: float


def check_path(path: str) -> str:
    """Return `path` if it is a plain relative object path; StoreError if it could leave the store's prefix."""
    if not all(_SEGMENT.fullmatch(segment) for segment in path.split("/")):
        raise StoreError(
            f"illegal object name: {path!r}",
            hint="use letters, digits and . _ = + @ , - between slashes; no segment starts with a dot",
        )
    return path


class Objects(ABC):
    """An open store of objects. All methods are thread-safe and raise StoreError when the store fails."""

    url: str
    # Concurrent requests that pay: many for a bucket, one where a request is a system call.
    parallelism: int = 1

    def __init__(self, url: str) -> None:
        self.url = url
        self._clock: tuple[float, float] | None = None  # (store time, our clock) of one measurement
        self._clock_lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @abstractmethod
    def read(self, path: str) -> Object | None:
        """Return the object with its version and age, or None if it is absent."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write or overwrite; for advisory objects alone."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write only if absent; False if the object exists. Of any number of callers exactly one gets True."""

    @abstractmethod
    def replace(self, path: str, data: bytes, version: str) -> bool:
        """Write only if the object still has `version`; False if it changed or vanished meanwhile."""

    @abstractmethod
    def upload(self, path: str, source: Path) -> tuple[int, str]:
        """Stream a file to a path that nobody else writes; return the size and sha256 of the bytes that were sent."""

    @abstractmethod
    def chunks(self, path: str) -> Iterator[bytes] | None:
        """Yield the object's bytes in order, bounded in memory, or return None if it is absent."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every object below the folder `prefix`, at any depth, sorted by path within a folder."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete; no error if the object is absent."""

    @abstractmethod
    def _touch(self) -> float:
        """Write something and return the time that the store gave it."""

    def sweep(self, older_than: float) -> int:
        """Delete what killed writers left before the store time `older_than`, where the store shows it; the count."""
        return 0

    def local_path(self, path: str) -> Path | None:
        """Return the object's file if the store is a local folder, else None."""
        return None

    def get(self, path: str) -> bytes | None:
        """Return the object's bytes, or None if it is absent."""
        found = self.read(path)
        return None if found is None else found.data

    def get_versioned(self, path: str) -> tuple[bytes, str] | None:
        """Return the object's bytes and the version for `replace`, or None if it is absent."""
        found = self.read(path)
        return None if found is None else (found.data, found.version)

    def now(self) -> float:
        """Return the store's clock, in seconds; the host's wall clock plays no part in it."""
        with self._clock_lock:
            mine = time.clock_gettime(_CLOCK)
            if self._clock is None or not 0 <= mine - self._clock[1] < _CLOCK_LIFE:
                self._clock = (self._touch(), mine)
            return self._clock[0] + (mine - self._clock[1])

    def parallel(self, function: Callable[[T], R], items: Iterable[T]) -> Sequence[R]:
        """Map `function` over `items` with as many requests at once as pay here; results in order."""
        work = list(items)
        if self.parallelism == 1 or len(work) < 2:
            return [function(item) for item in work]
        with self._clock_lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.parallelism, thread_name_prefix="store")
        return list(self._pool.map(function, work))
