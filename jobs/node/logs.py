"""A process's own stdout and stderr, readable for shipping: advisory, the truth of a run is in its artifacts.

When the scheduler already wrote them to one regular file of this process alone, that file is read. Otherwise the two
descriptors are redirected to a file and what arrives there is passed on to the original stdout.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

# A log in the store is one object, put again as it grows: its head and its tail are what people read.
HEAD_BYTES = 64 * 1024
TAIL_BYTES = 1024 * 1024


class LogFile:
    """The bytes this process has written to stdout and stderr so far; `alone`: no other rank writes to the same."""

    def __init__(self, scratch: Path, *, alone: bool = True) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._forward: int | None = None
        out, err = os.fstat(1), os.fstat(2)
        if alone and stat.S_ISREG(out.st_mode) and (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino):
            self._read = os.open("/proc/self/fd/1", os.O_RDONLY)
            self._start = out.st_size
        else:
            self._forward = os.dup(1)
            path = scratch / "output.txt"
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
            self._read = os.open(path, os.O_RDONLY)
            self._start = 0
        self._forwarded = self._start

    def size(self) -> int:
        """Return how many bytes were written since this process started."""
        return os.fstat(self._read).st_size - self._start

    def read(self) -> bytes:
        """Return the log, its middle left out when it is long."""
        size = self.size()
        if size <= HEAD_BYTES + TAIL_BYTES:
            return os.pread(self._read, size, self._start)
        head = os.pread(self._read, HEAD_BYTES, self._start)
        tail = os.pread(self._read, TAIL_BYTES, self._start + size - TAIL_BYTES)
        return head + b"\n[... %d bytes left out ...]\n" % (size - HEAD_BYTES - TAIL_BYTES) + tail

    def forward(self) -> None:
        """Pass new bytes on to the original stdout."""
        if self._forward is None:
            return
        while data := os.pread(self._read, 1 << 16, self._forwarded):
            self._forwarded += len(data)
            try:
                os.write(self._forward, data)
            except OSError:
                self._forward = None
                return
