"""The node-local cache of blobs, by checksum."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator import resources
from orchestrator.store import Blob

CACHE_BYTES = 20 * 2**30
# What was used since is not deleted: a job fetches all files of a state before it opens the first one.
USED_SECONDS = 3600.0


def cache_directory() -> Path:
    """Return the node-local cache of blobs, by checksum (MOEGRID_CACHE, else the user's cache directory)."""
    return resources.cache_root() / "blobs"


def _is_whole(path: Path, blob: Blob) -> bool:
    """Whether a cached file has the blob's bytes: a cache lies on a disk that can be damaged as any other."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == blob.size and (
                hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256
            )
    except OSError:
        return False


Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """Return what tells a file from one that takes its place, None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns


@contextlib.contextmanager
def alone(root: Path, blob: Blob) -> Iterator[None]:
    """Let one process of this node after the other come to a blob; where files cannot be locked, all at once."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = root.with_name("locks")
            folder.mkdir(parents=True, exist_ok=True)
            # So many files at most, whatever the cache has held.
            file = stack.enter_context((folder / blob.sha256[:3]).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def use(path: Path) -> bool:
    """Note that a cached file is used now; False when another process has deleted it meanwhile."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # another user's: it serves all the same
        pass
    return True


def prune_cache(root: Path, keep: Path, limit: int = CACHE_BYTES, used: float = USED_SECONDS) -> None:
    """Delete the longest unused blobs until `root` holds at most `limit` bytes; `keep` and what is in use stay."""
    files, newest = [], time.time() - used
    for path in root.glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for modified, size, path in sorted(files):
        if total <= limit:
            return
        if path != keep and modified <= newest:
            path.unlink(missing_ok=True)
            total -= size
