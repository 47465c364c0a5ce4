"""Two thousand stages on eight logical nodes of Ray with preemptions, lost nodes, a new cluster and a killed driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import many_ray
from tests.lab_ray import RayLab, lab_of

pytestmark = pytest.mark.faults

NODES, CELLS, SECONDS = 8, 128, 2400.0


@pytest.fixture(scope="module")
def large() -> Iterator[RayLab]:
    yield from lab_of(NODES, many_ray.CORES)


def test_two_thousand_stages_come_to_their_end(large: RayLab, tmp_path: Path) -> None:
    seen = many_ray.run(large, tmp_path, nodes=NODES, cells=CELLS, seconds=SECONDS)
    print(seen)
    assert seen["stages"] > 1900
    assert seen["most calls in a tick"]["ray.poll"] <= 1, seen
    assert seen["most calls in a tick"]["ray._cluster"] <= 6, "poll, submit, find, forget, cancel"
