"""No store key is also a folder of another: some S3 servers lose one of the two, or end a listing early."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any

from orchestrator.store.bucket import BucketObjects
from orchestrator.store.local import LocalObjects

WRITES = ("put", "create", "replace", "upload")


def keys_that_are_folders(paths: Iterable[str]) -> list[str]:
    """Return those of `paths` below which others of them lie."""
    keys = set(paths)
    folders = {str(parent) for path in keys for parent in PurePosixPath(path).parents}
    return sorted(keys & folders)


class Written:
    """Every key that this process has written, by store, deleted ones too."""

    def __init__(self) -> None:
        self.keys: dict[str, set[str]] = {}
        self.folders: dict[str, set[str]] = {}

    def add(self, url: str, path: str) -> None:
        """Note a write; AssertionError when the key is a folder of another, or lies below one."""
        keys, folders = self.keys.setdefault(url, set()), self.folders.setdefault(url, set())
        above = [str(parent) for parent in PurePosixPath(path).parents][:-1]
        keys.add(path)
        folders.update(above)
        assert path not in folders, f"{path} is a key and a folder of the store {url}"
        assert not keys.intersection(above), f"{path} lies below a key of the store {url}"


def watch_every_store() -> None:
    """Let no test write a key that is also a folder."""
    written = Written()
    for kind in (LocalObjects, BucketObjects):
        for name in WRITES:
            setattr(kind, name, _watched(getattr(kind, name), written))


def _watched(write: Callable[..., Any], written: Written) -> Callable[..., Any]:
    @functools.wraps(write)
    def watched(self: Any, path: str, *arguments: Any) -> Any:
        result = write(self, path, *arguments)
        written.add(self.url, path)
        return result

    return watched
