"""What a node says about its own end: an exception becomes one failure kind, a message and a hint."""

from __future__ import annotations

import errno
import traceback
from typing import Any

from orchestrator.errors import (
    EXIT_FAILED,
    CorruptBlob,
    GridError,
    LeaseLost,
    MoegridError,
    NumericsError,
    SourceError,
    StoreError,
)

# Another process owns the work: nothing was done, nothing must be retried.
EXIT_NOT_MINE = 76

_BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (CorruptBlob, "corrupt"),
    (StoreError, "unreachable"),
    (SourceError, "source"),
    (NumericsError, "numerics"),
    (LeaseLost, "lease_lost"),
    (GridError, "bad_spec"),
    (MemoryError, "oom"),
    (ImportError, "import"),
    (AssertionError, "assertion"),
)
_BY_TEXT: tuple[tuple[str, str], ...] = (
    ("no space left on device", "disk_full"),
    ("disk quota exceeded", "disk_full"),
    ("out of memory", "oom"),
    ("can't allocate memory", "oom"),
    ("cannot allocate memory", "oom"),
    ("not enough memory", "oom"),
)
_HINTS = {
    "oom": "give the stage more memory (resources.<kind>.memory_gb) or fewer tokens at a time",
    "disk_full": "free space on the node's scratch directory or the store, then run `make resume`",
    "import": "the node's environment lacks a package: install the project there with the pinned constraints",
}


def kind_of(error: BaseException) -> str:
    """Return the failure kind of `error`, looking through the exceptions that caused it."""
    seen: BaseException | None = error
    while seen is not None:
        own = getattr(seen, "failure_kind", "")
        if own:
            return str(own)
        text = str(seen).lower()
        for signature, kind in _BY_TEXT:
            if signature in text:
                return kind
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk_full"
        for cls, kind in _BY_CLASS:
            if isinstance(seen, cls):
                return kind
        seen = seen.__cause__ or seen.__context__
    return "error"


def exit_code_of(error: BaseException) -> int:
    """Return the node's exit code for `error`."""
    return EXIT_NOT_MINE if isinstance(error, LeaseLost) else EXIT_FAILED


def describe(stage: str, error: BaseException) -> dict[str, Any]:
    """Return `failure.json` for `error` in `stage`."""
    kind = kind_of(error)
    message = error.error if isinstance(error, MoegridError) else f"{type(error).__name__}: {error}"
    if isinstance(error, MoegridError) and error.cause:
        message += f" ({error.cause})"
    hint = error.hint if isinstance(error, MoegridError) else ""
    record = {
        "stage": stage,
        "kind": kind,
        "message": message[:2000],
        "hint": hint or _HINTS.get(kind, ""),
        "traceback": "".join(traceback.format_exception(error))[-8000:],
        "exit_code": exit_code_of(error),
    }
    if isinstance(error, CorruptBlob):
        record["artifact"] = error.artifact
    return record
