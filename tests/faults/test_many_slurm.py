"""Two thousand stages on 64 nodes of SLURM with preemptions, lost nodes, a controller and a driver that restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import many_slurm
from tests.lab_slurm import SlurmLab, lab_of

pytestmark = pytest.mark.faults

NODES, CELLS, SECONDS = 64, 128, 1500.0


@pytest.fixture(scope="module")
def large() -> Iterator[SlurmLab]:
    yield from lab_of(many_slurm.shape(NODES))


def test_two_thousand_stages_come_to_their_end(large: SlurmLab, tmp_path: Path) -> None:
    seen = many_slurm.run(large, tmp_path, nodes=NODES, cells=CELLS, seconds=SECONDS)
    print(seen)
    assert seen["stages"] > 1900
    calls = seen["most calls in a tick"]
    assert calls["squeue"] <= 1, seen
    assert calls.get("sacct", 0) <= 1, seen
