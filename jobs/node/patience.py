"""How long a node waits for a store that is away."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import CorruptBlob, StoreError

log = logging.getLogger(__name__)


T = TypeVar("T")


# How long a node waits for a store that is away before it gives up what it wanted to write or read.
PATIENCE_SECONDS = 900.0


# A full disk does not mend by waiting; one that refuses to be written seldom does.
_HOPELESS = (errno.ENOSPC, errno.EDQUOT)


_SELDOM = (errno.EROFS, errno.EACCES, errno.EPERM)


SELDOM_SECONDS = 60.0


def patiently(action: Callable[[], T], what: str, patience: float | None = None) -> T:
    """Return `action()`, tried again with growing pauses while the store is unreachable."""
    patience = PATIENCE_SECONDS if patience is None else patience
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except CorruptBlob:
            raise
        except StoreError as error:
            number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
            limit = min(patience, SELDOM_SECONDS) if number in _SELDOM else patience
            if number in _HOPELESS or time.monotonic() - began + pause > limit:
                raise
            log.warning("%s: %s; trying again in %.0f s", what, error.error, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
