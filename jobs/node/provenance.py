"""Where an artifact came from: recorded in its manifest, never hashed."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""


@lru_cache(maxsize=1)
def provenance() -> dict[str, Any]:
    """Return git commit, digest of uncommitted changes, lock digest, command, host and interpreter."""
    lock = ROOT / "constraints.txt"
    changes = _git("diff", "HEAD")
    return {
        "git": _git("rev-parse", "HEAD").decode().strip(),
        "dirty": hashlib.sha256(changes).hexdigest()[:16] if changes else "",
        "lock": hashlib.sha256(lock.read_bytes()).hexdigest()[:16] if lock.is_file() else "",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }
