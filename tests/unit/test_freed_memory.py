"""Memory that is kept for reuse, and given back where it lies in holes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import psutil, torch
from jobs.node.numerics import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
resident = psutil.Process().memory_info
large, small = [], []
for _ in range(300):
    large.append(torch.ones(2**18))
    small.append(torch.ones(2**8))
large.clear()
kept = resident().rss
give_back_freed_memory()
print((kept - resident().rss) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux alone is asked")
def test_holes_between_blocks_that_stay_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 200  # of 300 MB
