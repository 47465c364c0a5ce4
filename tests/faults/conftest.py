"""The undisturbed run that every disturbed one is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A fresh store; its processes end with the test."""
    made = Lab(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The results of an undisturbed run, and how many counted calls its driver made."""
    made = Lab(tmp_path_factory.mktemp("undisturbed"))
    count = made.folder / "count"
    code, said = made.drive(FAULT_COUNT=str(count))
    assert code == 0, said
    results = made.results()
    made.close()
    return results, len(count.read_text().splitlines())


@pytest.fixture(scope="session")
def reference(undisturbed: tuple[dict[str, Any], int]) -> dict[str, Any]:
    """The results of an undisturbed run."""
    return undisturbed[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the whole harness to `make faults`: without its marker in -m only the sample runs."""
    if "faults" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("faults")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
