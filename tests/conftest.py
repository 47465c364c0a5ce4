"""Fixtures that all tests share. Servers are session-scoped: one of each per test run."""

from __future__ import annotations

import os

import pytest

# Two cores run the whole suite: libraries that spawn a thread per core only get in each other's way.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests import store_keys  # noqa: E402
from tests.s3_lab import proxy, s3, s3_server  # noqa: E402, F401 (fixtures)

# Fixtures that are one server a run: whatever uses one of them runs in one process when there are several.
LABS = {"slurm_lab", "ray_lab", "s3_server", "server"}

pytest_plugins = ["tests.lab_slurm", "tests.lab_ray"]

store_keys.watch_every_store()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell several processes (`make test`) which tests belong together: those of a lab, and those of a file."""
    for item in items:
        uses_lab = LABS.intersection(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("labs" if uses_lab else item.path.stem))
