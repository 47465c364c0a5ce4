"""Which tests stay together when several processes run them.

xdist 3.8.0 has groups of its own (`--dist loadgroup`), which do nothing with pytest 9.2: the name they change is gone.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
# A test that takes one of the labs as a fixture: each is one server a run.
USES_LAB = re.compile(r"\b(s3|slurm_lab|ray_lab|server): (S3Lab|SlurmLab|RayLab|Server)\b")


class ByLab(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out whole files, and those that use a lab as one."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid.split("::", 1)[0])


@cache
def scope(path: str) -> str:
    """Return what a test file belongs to: itself, or all that need a lab."""
    return "labs" if USES_LAB.search((ROOT / path).read_text()) else path
