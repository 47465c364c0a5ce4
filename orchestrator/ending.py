"""How a process with large libraries ends: at once, when all who asked to be told of its end have been.

Python takes hundreds of modules apart before a process with torch in it is gone: half a second in which its cores and
memory still count as taken, after everything it was for has been written.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys

_code: int | None = None


def ends_at_once() -> None:
    """Let this process and its forks end with `code` as soon as nothing but taking them apart is left to be done.

    To be called before the libraries are imported: what was registered at atexit last is called first.
    """
    atexit.register(_end)


def with_code(code: int) -> int:
    """Return the exit code with which the process is going to end."""
    global _code
    _code = code
    return code


def _end() -> None:
    if _code is None:  # an exception that nobody caught is told as ever
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(_code)
