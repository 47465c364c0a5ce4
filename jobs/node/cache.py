"""The node-local cache of blobs, by checksum."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from orchestrator import resources
from orchestrator.store import Blob

CACHE_BYTES = 20 * 2**30


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


def prune_cache(root: Path, keep: Path, limit: int = CACHE_BYTES) -> None:
    """Delete the longest unused blobs until `root` holds at most `limit` bytes; `keep` stays."""
    files = []
    for path in root.glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size
