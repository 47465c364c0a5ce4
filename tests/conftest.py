"""Fixtures that all tests share. Servers are session-scoped: one of each per test run."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Two cores run the whole suite: libraries that spawn a thread per core only get in each other's way.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# What a command says is compared as it is said without a terminal: lines of any length.
os.environ.pop("COLUMNS", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jobs.node import machine  # noqa: E402
from tests import store_keys  # noqa: E402
from tests.s3_lab import proxy, s3, s3_server  # noqa: E402, F401 (fixtures)

pytest_plugins = ["tests.lab_slurm", "tests.lab_ray"]

# Tests compare what this process computes with what jobs do: the same code path of the CPU, before torch is imported.
machine.choose_branch(os.environ)
store_keys.watch_every_store()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Where several processes run the tests (`make test`), keep files whole and all that use a lab in one of them."""
    from tests.scheduling import ByLab

    return ByLab(config, log)
