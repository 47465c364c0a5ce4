"""What goes wrong in a job at one moment: the folder of its store fails, or the work itself does.

FAKE_TROUBLE names a file with {"what": ..., "moment": "start" | "middle" | "commit", "label": part of a stage's label}.
A trouble of the store lasts from its moment to the end of the process; `label` "" means every job.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import run
from jobs.node import opening, patience
from jobs.node.context import StageContext
from jobs.train.errors import Diverged, NotFinite, RouterCollapsed
from orchestrator.errors import MoegridError, SourceError
from orchestrator.spec.work import TrainWork, Work
from orchestrator.store import bucket
from orchestrator.store.attempts import PlannedJob
from orchestrator.store.bucket import BucketObjects
from orchestrator.store.local import LocalObjects

STORE_CALLS = ("read", "get", "put", "create", "replace", "upload", "chunks", "list", "delete", "_touch")
PATIENCE = float(os.environ.get("FAKE_PATIENCE", "0.5"))
MIDDLE_STEP = 15

_away = ""


def install() -> None:
    """Shorten every patience of this process, and let its store fail when a trouble says so."""
    if "FAKE_TROUBLE" not in os.environ:
        return
    for module in (opening, run):
        setattr(module, "START_PATIENCE_SECONDS", PATIENCE)  # noqa: B010 (run has it from opening)
    patience.PATIENCE_SECONDS = run.RECORD_PATIENCE_SECONDS = PATIENCE
    patient: Any = BucketObjects.__init__

    def hurried(self: BucketObjects, url: str, *, patience: float) -> None:
        patient(self, url, patience=min(patience, PATIENCE))

    BucketObjects.__init__ = hurried  # type: ignore[method-assign]
    bucket.REQUEST_SECONDS = 2 * PATIENCE
    if endpoint := os.environ.get("FAKE_ENDPOINT"):
        os.environ["AWS_ENDPOINT_URL"] = endpoint
    for name in STORE_CALLS:
        setattr(LocalObjects, name, failing(name, getattr(LocalObjects, name)))
    order = trouble()
    if order["moment"] == "start" and not order["label"]:
        begin(order["what"])
    if order["moment"] == "start" and order["what"] in OWN:
        real = opening.read_job

        def read_job(job: PlannedJob) -> Any:
            if any(order["label"] in stage.label for stage in job.stages):
                fail(order["what"])
            return real(job)

        setattr(run, "read_job", read_job)  # noqa: B010 (run has it from opening)
    committing = StageContext.commit_written

    def commit_written(self: StageContext, work: Work, *arguments: Any, **options: Any) -> Any:
        if happen(self.label, "commit") == "no commit":
            return None
        return committing(self, work, *arguments, **options)

    StageContext.commit_written = commit_written  # type: ignore[method-assign]


def trouble() -> dict[str, str]:
    """Return what is ordered now."""
    path = Path(os.environ.get("FAKE_TROUBLE", "/nowhere"))
    return json.loads(path.read_text()) if path.exists() else {"what": "", "moment": "", "label": ""}


def happen(label: str, moment: str) -> str:
    """Let the trouble begin if this is its moment; return its name."""
    order = trouble()
    if order["moment"] != moment or order["label"] not in label:
        return ""
    if order["what"] in OWN:
        fail(order["what"])
    else:
        begin(order["what"])
    return order["what"]


def reached(work: Work, step: int) -> str:
    """Return the moment that a training step is, "" for none of them."""
    return "middle" if isinstance(work, TrainWork) and step == work.start + MIDDLE_STEP else ""


def begin(what: str) -> None:
    """From now on every call of this process to its folder fails."""
    global _away
    _away = what


def failing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call of the folder, as its operating system would fail it."""

    def call(self: LocalObjects, *arguments: Any, **options: Any) -> Any:
        if not _away:
            return function(self, *arguments, **options)
        if _away in ("garbage", "empty"):
            found = function(self, *arguments, **options)
            body = b"<html>busy</html>" if _away == "garbage" else b""
            if name == "get" and found is not None:
                return body
            if name == "read" and found is not None:
                return type(found)(body, found.version, found.modified)
            return found
        with self._errors("list" if name == "list" else "read", str(arguments[0]) if arguments else ""):
            raise OSError(number := getattr(errno, _away), os.strerror(number))

    return call


def _assertion() -> None:
    assert os.environ.get("NEVER"), "shapes differ"


def _import() -> None:
    import a_package_that_does_not_exist  # type: ignore[import-not-found]  # noqa: F401


def _raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# Ten ways in which the work itself fails; "no commit" is done by who asks.
OWN: dict[str, Callable[[], None]] = {
    "assertion": _assertion,
    "import": _import,
    "bad_spec": _raises(MoegridError("stage x does not produce the artifact it was planned for")),
    "nan": _raises(NotFinite("the loss is nan at step 7")),
    "diverged": _raises(Diverged("the loss is 19.2 at step 7, far above chance")),
    "router_collapsed": _raises(RouterCollapsed("one expert takes 99 % of the tokens")),
    "source": _raises(SourceError("/data/mine.jsonl:3 is not JSON", cause="it reads: connection refused")),
    "no file": _raises(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/mine.jsonl")),
    "encoding": _raises(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")),
    "no commit": lambda: None,
}


def fail(what: str) -> None:
    """Fail as the work itself does."""
    OWN[what]()
