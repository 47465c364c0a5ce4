"""From a URL to its objects: a folder, memory, an S3 bucket or what another package offers."""

from __future__ import annotations

from orchestrator.catalog.stores import STORES
from orchestrator.errors import StoreError
from orchestrator.registry import load
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
    kind = STORES.find(scheme or "file")
    if kind is None:
        kinds = "give a folder, file:///folder, memory:// or s3://bucket/prefix"
        raise StoreError(f"unknown kind of store: {scheme}://", hint=STORES.near(scheme) or kinds)
    objects: Objects = load(kind.code, STORES.who(kind.name))(url, patience, prepare)
    return objects
