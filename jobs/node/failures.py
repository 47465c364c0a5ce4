"""What a node says about its own end: an exception becomes one failure kind, a message and a hint."""

from __future__ import annotations

import json
import traceback
from typing import Any

from orchestrator.errors import (
    EXIT_AWAY,
    EXIT_FAILED,
    EXIT_NOT_MINE,
    SPOKEN_FAILURE,
    CodeError,
    CorruptBlob,
    GridError,
    LeaseLost,
    MoegridError,
    NumericsError,
    SourceAway,
    SourceError,
    StoreError,
)
from orchestrator.store.trouble import kind_of_number, kind_of_text

_BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (CorruptBlob, "corrupt"),
    (StoreError, "unreachable"),
    (SourceAway, "source_away"),
    (SourceError, "source"),
    (NumericsError, "numerics"),
    (CodeError, "code"),
    (LeaseLost, "lease_lost"),
    (GridError, "bad_spec"),
    (MemoryError, "oom"),
    (ImportError, "import"),
    (AssertionError, "assertion"),
    (ConnectionError, "unreachable"),
    (TimeoutError, "unreachable"),
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
# What the work itself raises: the words of such an error may quote anything, a data row say.
_OWN = (
    AssertionError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    ValueError,
)
_AWAY = frozenset({"unreachable", "disk_full", "corrupt", "parent_missing", "source_away"})
_HINTS = {
    "oom": "give the stage more memory (resources.<kind>.memory_gb) or fewer tokens at a time",
    "disk_full": "free space on the node's scratch directory or the store, then run `make resume`",
    "import": "the node's environment lacks a package: install the project there with the pinned constraints, then "
    "run `make resume ARGS='--retry all'`",
    "source": "correct the data, then run `make resume ARGS='--retry all'`",
    "unreachable": "check store and network with `moegrid doctor`, then run `make resume`",
}


def kind_of(error: BaseException) -> str:
    """Return the failure kind of `error`, looking through the exceptions that caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if kind := str(getattr(seen, "failure_kind", "")) or _kind_of_one(seen):
            return kind
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "error"


def _kind_of_one(error: BaseException) -> str:
    if isinstance(error, OSError) and (kind := kind_of_number(error.errno)):
        return kind
    if isinstance(error, StoreError) and isinstance(error.__cause__, OSError):
        kind = kind_of_number(error.__cause__.errno)
        if kind and not isinstance(error, CorruptBlob):
            return kind
    text = _words(error)
    if not _is_own(error):
        if any(words in text.lower() for words in _OUT_OF_MEMORY):
            return "oom"
        # A typed error of the project says by its class what it is, but a full disk is told by its cause.
        if (kind := kind_of_text(text)) and (kind == "disk_full" or not isinstance(error, MoegridError)):
            return kind
    return next((kind for cls, kind in _BY_CLASS if isinstance(error, cls)), "")


def _is_own(error: BaseException) -> bool:
    return isinstance(error, _OWN) or (isinstance(error, SourceError) and not isinstance(error, SourceAway))


def _words(error: BaseException) -> str:
    return f"{error.error}\n{error.cause}" if isinstance(error, MoegridError) else str(error)


def exit_code_of(error: BaseException) -> int:
    """Return the node's exit code for `error`."""
    if isinstance(error, LeaseLost):
        return EXIT_NOT_MINE
    return EXIT_AWAY if kind_of(error) in _AWAY else EXIT_FAILED


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
        "own": _is_own(error),
    }
    if isinstance(error, CorruptBlob):
        record["artifact"] = error.artifact
    return record


def spoken(attempt: str, record: dict[str, Any]) -> str:
    """Return the line that tells a log of `record`, for when the store cannot be told."""
    told = {name: value for name, value in record.items() if name != "traceback"}
    return f"{SPOKEN_FAILURE} {json.dumps({'attempt': attempt, **told})}"
