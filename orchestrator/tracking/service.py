"""When grids are published: once and completely (`sync`), or live beside a run (`follow`, `serve`).

One leased publisher of a store and a tracker works at a time; the others wait for their turn.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.catalog.trackers import TRACKERS, tracker_of
from orchestrator.errors import EXIT_UNREACHABLE, MoegridError, StoreError
from orchestrator.registry import load
from orchestrator.store import Store, records
from orchestrator.tracking.publish import GridPublisher, Published
from orchestrator.tracking.tracker import Tracker, TrackerAway
from orchestrator.tracking.turn import LEASE_SECONDS, Turn, short_digest

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
LONGEST_PAUSE = 60.0


def sync(
    store: Store,
    grids: str | Sequence[str],
    tracking_uri: str,
    *,
    tracker: Tracker | None = None,
    files: Callable[[str], Path] | None = None,
) -> list[Published]:
    """Show everything the store holds of `grids` in the tracker; nothing is shown twice, nothing is left out.

    `files` returns the folder with what is attached to the runs of a grid; it is asked only when something is new.
    Waits up to a minute for another publisher to finish. Raises TrackerAway when the tracker is away, MoegridError
    for an unknown grid or when another publisher stays at work.
    """
    names = [grids] if isinstance(grids, str) else list(grids)
    for name in names:
        records.document(store, name)
    with Turn(store, tracking_uri) as turn:
        if not turn.wait(LEASE_SECONDS + 5):
            raise MoegridError(
                "another process is publishing to this tracker",
                cause=f"it holds the lease {turn.name}",
                hint="a running grid publishes by itself; try again when it has ended",
            )
        target = tracker or connect(tracking_uri)
        done = []
        for name in names:
            signature = _signature(store, name)
            publisher = GridPublisher(store, target, name)
            summary = publisher.tick()
            done.append(summary)
            if files is not None and (summary.created or summary.points or not publisher.has_report):
                publisher.attach(files(name))
            if publisher.damaged:
                log.warning("%d series of %s are damaged and not shown: moegrid resume", len(publisher.damaged), name)
            else:
                _mark(store, name, tracking_uri, signature)
        return done


def follow(
    store: Store,
    grids: Iterable[str],
    tracking_uri: str,
    *,
    stop: threading.Event,
    interval: float = INTERVAL_SECONDS,
    tracker: Callable[[], Tracker] | None = None,
    attachments: Path | None = None,
) -> bool:
    """Publish `grids` until `stop` is set, then once more; return whether that last publication was complete.

    The last one attaches what lies in `attachments/GRID` by then.
    A tracker or store that is away is told once, and asked again with growing pauses. While another publisher holds
    the lease this one waits for its turn.
    """
    names = list(grids)
    pause, warned, publishers = interval, False, None
    with Turn(store, tracking_uri) as turn:
        while True:
            ending = stop.is_set()
            try:
                if turn.wait(LEASE_SECONDS if ending else 0):
                    if publishers is None:
                        target = tracker() if tracker else connect(tracking_uri)
                        publishers = [GridPublisher(store, target, name) for name in names]
                    for name, publisher in zip(names, publishers, strict=True):
                        signature = _signature(store, name) if ending else ""
                        publisher.tick(following=not ending)
                        if ending and attachments is not None and (attachments / name).is_dir():
                            publisher.attach(attachments / name)
                        if ending and not publisher.damaged:
                            _mark(store, name, tracking_uri, signature)
                    if warned:
                        log.info("the tracker is back; everything is there")
                    pause, warned = interval, False
                    if ending:
                        return True
            except (TrackerAway, StoreError) as error:
                if not warned:
                    log.warning("the tracker is not up to date, the run goes on: %s", error.cause or error.error)
                warned, pause = True, min(pause * 2, LONGEST_PAUSE)
                if ending:
                    return False
            stop.wait(pause)


def published(store: Store, grid: str, tracking_uri: str) -> bool:
    """Return whether an earlier sync already showed all that the store holds of `grid` (cheap; advisory)."""
    known = store.find_json(_marker(grid, tracking_uri)) or {}
    if known.get("signature") != _signature(store, grid):
        return False
    path = tracking_uri.removeprefix("sqlite:///")
    return path == tracking_uri or os.path.exists(path)


def connect(tracking_uri: str) -> Tracker:
    """Return the tracker behind `tracking_uri`."""
    kind = tracker_of(tracking_uri)
    tracker: Tracker = load(kind.code, TRACKERS.who(kind.name))(tracking_uri)
    return tracker


def serve(
    store: Store,
    grids: Iterable[str],
    tracking_uri: str,
    *,
    interval: float = INTERVAL_SECONDS,
    attachments: Path | None = None,
) -> int:
    """Publish until SIGTERM or SIGINT, or until the process that started this one is gone; return the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    parent = os.getppid()

    def watch() -> None:
        while not stop.wait(1.0):
            if os.getppid() != parent:
                stop.set()

    threading.Thread(target=watch, daemon=True).start()
    done = follow(store, grids, tracking_uri, stop=stop, interval=interval, attachments=attachments)
    return 0 if done else EXIT_UNREACHABLE


def _marker(grid: str, tracking_uri: str) -> str:
    return f"tracking/{short_digest(tracking_uri)}/{grid}.json"


def _signature(store: Store, grid: str) -> str:
    """Return a digest of the grid's versions and of which of their artifacts exist."""
    documents = records.documents(store, grid)
    wanted = {key for document in documents for key in document["keys"]}
    there = sorted(wanted & store.artifacts.keys())
    return short_digest(json.dumps([sorted(document["digest"] for document in documents), there]))


def _mark(store: Store, grid: str, tracking_uri: str, signature: str) -> None:
    store.objects.put(_marker(grid, tracking_uri), json.dumps({"signature": signature}).encode())
