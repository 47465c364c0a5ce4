"""Faults at the store's boundary: count every write of a process, and kill it before or after any one of them.

`install` puts the counting wrapper in the place of `open_objects`, the one door to every store. Run as a program this
module claims, enters, writes blobs and commits an artifact, and dies at the write it is told to.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.store import Entry, Manifest, Objects, Store, opening
from orchestrator.store.objects import Object

# claim, enter, two blobs, renewal, manifest, release
COMMIT_SEQUENCE_WRITES = 7


class FaultyObjects(Objects):
    """Passes everything on to `inner`; `on_write(number, path, moment)` is called around the nth write (from 0)."""

    def __init__(self, inner: Objects, on_write: Callable[[int, str, str], None]) -> None:
        super().__init__(inner.url)
        self.parallelism = inner.parallelism
        self.inner = inner
        self.writes: list[str] = []
        self._on_write = on_write

    def _around(self, path: str, write: Callable[[], object]) -> object:
        number = len(self.writes)
        self.writes.append(path)
        self._on_write(number, path, "before")
        result = write()
        self._on_write(number, path, "after")
        return result

    def put(self, path: str, data: bytes) -> None:
        self._around(path, lambda: self.inner.put(path, data))

    def create(self, path: str, data: bytes) -> bool:
        return bool(self._around(path, lambda: self.inner.create(path, data)))

    def replace(self, path: str, data: bytes, version: str) -> bool:
        return bool(self._around(path, lambda: self.inner.replace(path, data, version)))

    def upload(self, path: str, source: Path) -> tuple[int, str]:
        result = self._around(path, lambda: self.inner.upload(path, source))
        assert isinstance(result, tuple)
        return result

    def delete(self, path: str) -> None:
        self._around(path, lambda: self.inner.delete(path))

    def read(self, path: str) -> Object | None:
        return self.inner.read(path)

    def chunks(self, path: str) -> Iterator[bytes] | None:
        return self.inner.chunks(path)

    def list(self, prefix: str) -> Iterator[Entry]:
        return self.inner.list(prefix)

    def local_path(self, path: str) -> Path | None:
        return self.inner.local_path(path)

    def sweep(self, older_than: float) -> int:
        return self.inner.sweep(older_than)

    def now(self) -> float:
        return self.inner.now()

    def _touch(self) -> float:
        return self.inner.now()


def kill_at(number: int, moment: str) -> Callable[[int, str, str], None]:
    """SIGKILL this process `moment` ("before" or "after") its nth write."""

    def on_write(current: int, path: str, now: str) -> None:
        if (current, now) == (number, moment):
            os.kill(os.getpid(), signal.SIGKILL)

    return on_write


def install(on_write: Callable[[int, str, str], None]) -> None:
    """Wrap every store that this process opens from now on."""
    genuine = opening.open_objects

    def open_faulty(url: str, *, patience: float = 30.0) -> Objects:
        return FaultyObjects(genuine(url, patience=patience), on_write)

    opening.open_objects = open_faulty


def commit_sequence(store: Store, attempt: str) -> None:
    """What a job does for one artifact, on a lease that expires at once so that the next attempt need not wait."""
    key = "a" * 64
    assert store.claims.claim(key, attempt, ttl=0.0)
    lease = store.claims.enter(key, attempt)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        weights.write_bytes(attempt.encode() * 100_000)
        blobs = (
            store.artifacts.write_blob(attempt, "weights.safetensors", weights),
            store.artifacts.write_blob(attempt, "state.json", b'{"step": 3}'),
        )
    store.claims.renew(lease)
    store.claims.check(lease)
    store.artifacts.commit(Manifest(key=key, kind="train", spec={}, blobs=blobs, attempt=attempt))
    store.claims.release(lease)


def main() -> None:
    url, attempt, number, moment = sys.argv[1:]
    install(kill_at(int(number), moment))
    store = Store.open(url)
    assert isinstance(store.objects, FaultyObjects)
    commit_sequence(store, attempt)
    assert len(store.objects.writes) <= COMMIT_SEQUENCE_WRITES + 1, store.objects.writes


if __name__ == "__main__":
    main()
