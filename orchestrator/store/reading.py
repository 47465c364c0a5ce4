"""A store that is only read: nothing in it is made or changed, not even the folder of one that does not exist yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from orchestrator.errors import StoreError
from orchestrator.store.objects import Entry, Object, Objects


class ReadOnlyObjects(Objects):
    """The objects of `inner`, for a command that reads.

    The store's clock is not asked, for that would write: it is this machine's, or the newest object's time if that is
    later.
    """

    def __init__(self, inner: Objects) -> None:
        super().__init__(inner.url)
        self.parallelism = inner.parallelism
        self._inner = inner
        self._newest = 0.0

    def read(self, path: str) -> Object | None:
        found = self._inner.read(path)
        if found is not None:
            self._newest = max(self._newest, found.modified)
        return found

    def get(self, path: str) -> bytes | None:
        return self._inner.get(path)

    def chunks(self, path: str) -> Iterator[bytes] | None:
        return self._inner.chunks(path)

    def list(self, prefix: str) -> Iterator[Entry]:
        for entry in self._inner.list(prefix):
            self._newest = max(self._newest, entry.modified)
            yield entry

    def local_path(self, path: str) -> Path | None:
        return self._inner.local_path(path)

    def now(self) -> float:
        return max(time.time(), self._newest)

    def put(self, path: str, data: bytes) -> None:
        self._refuse(path)

    def create(self, path: str, data: bytes) -> bool:
        self._refuse(path)

    def replace(self, path: str, data: bytes, version: str) -> bool:
        self._refuse(path)

    def upload(self, path: str, source: Path) -> tuple[int, str]:
        self._refuse(path)

    def delete(self, path: str) -> None:
        self._refuse(path)

    def _touch(self) -> float:
        return self.now()

    def _refuse(self, path: str) -> NoReturn:
        raise StoreError(f"cannot write {path}: {self.url} was opened to be read", hint="moegrid run writes it")
