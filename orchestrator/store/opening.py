"""From a URL to its objects: a folder, memory or an S3 bucket."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.errors import StoreError
from orchestrator.store.objects import PATIENCE, Objects
from orchestrator.store.reading import ReadOnlyObjects


def open_objects(url: str, *, patience: float = PATIENCE) -> Objects:
    """Open a plain path, `file://`, `memory://[name]` or `s3://bucket[/prefix]`.

    Credentials for S3 come from the environment or the standard AWS files and roles, never from `url`.
    `patience`: seconds to retry an unreachable bucket before an operation raises StoreError.
    """
    return _open(url, patience, prepare=True)


def peek_objects(url: str, *, patience: float = PATIENCE) -> Objects:
    """Open what lies at `url` to be read: a folder that does not exist is not made, and nothing can be written."""
    return ReadOnlyObjects(_open(url, patience, prepare=False))


def _open(url: str, patience: float, *, prepare: bool) -> Objects:
    if not url:
        raise StoreError("no store was given", hint="set STORE= or --store to a folder or s3://bucket/prefix")
    scheme = url.split("://", 1)[0] if "://" in url else ""
    if scheme in ("", "file"):
        from orchestrator.store.local import LocalObjects

        if scheme and urlsplit(url).netloc not in ("", "localhost"):
            raise StoreError(f"{url} names a folder of another host", hint="write file:///folder or the plain path")
        folder = unquote(urlsplit(url).path) if scheme else os.path.expanduser(url)
        return LocalObjects(Path(folder), prepare=prepare)
    if scheme in ("memory", "s3"):
        from orchestrator.store.bucket import BucketObjects

        return BucketObjects(url, patience=patience)
    raise StoreError(
        f"unknown kind of store: {scheme}://",
        hint="give a folder, file:///folder, memory:// or s3://bucket/prefix",
    )
