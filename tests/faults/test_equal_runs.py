"""Real jobs leave the same results however often they are run, slow their store is and often they are killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.store import Manifest, Store
from orchestrator.store.manifest import OBSERVATIONS
from tests.s3_faults import FaultyProxy
from tests.s3_lab import S3Lab
from tests.small_grid import GRID, jobs_of, made_up_text, moegrid

KILLS = 20
# What a logged row says of the machine instead of the model.
OBSERVED = {"time", "train/tokens_per_second", "system/rss_gb"}
Picture = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two schedules and three fractions on made-up text, a state at every step."""
    folder = made_up_text(tmp_path_factory.mktemp("data"))
    path = folder / "small.yaml"
    path.write_text(GRID.format(at="[0.25, 0.5, 1.0]", folder=folder))
    return path


def arguments(command: str, grid: Path, url: str) -> list[str]:
    return [command, str(grid), "--store", url, "--tracking", "none", "--no-report"]


def picture(url: str) -> Picture:
    """Return key -> all that an artifact holds without times, rates, hosts: digest, parents, metrics, rows."""
    store = Store.open(url)
    manifests = store.artifacts.many(store.artifacts.keys())
    return {key: content(store, manifest) for key, manifest in manifests.items()}


def content(store: Store, manifest: Manifest) -> dict[str, Any]:
    rows = [
        [{name: value for name, value in row.items() if name not in OBSERVED} for row in json.loads(body)]
        for body in (store.artifacts.read(blob) for blob in manifest.blobs if blob.name in OBSERVATIONS)
    ]
    return {
        "kind": manifest.kind,
        "digest": manifest.digest,
        "parents": dict(manifest.parents),
        "metrics": dict(manifest.metrics),
        "numerics": dict(manifest.numerics),
        "rows": rows,
    }


def table(grid: Path, url: str) -> str:
    return moegrid("table", str(grid), "--store", url, "--format", "csv")


def run(grid: Path, url: str) -> tuple[Picture, str]:
    """Run the grid, return its picture and its table."""
    moegrid(*arguments("run", grid, url))
    return picture(url), table(grid, url)


@pytest.fixture(scope="module")
def undisturbed(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Picture, str]:
    return run(grid, str(tmp_path_factory.mktemp("undisturbed") / "store"))


def assert_equal(grid: Path, found: tuple[Picture, str], expected: tuple[Picture, str]) -> None:
    """Every stage is there, and nothing that both runs made differs.

    Which states lie between the planned ones depends on how often a run was cut and on how fast its store took them.
    """
    stages = build_graph(load_grid(str(grid))).stages.keys()
    assert len(stages) > 10
    assert stages <= found[0].keys() & expected[0].keys()
    common = found[0].keys() & expected[0].keys()
    assert {key: found[0][key] for key in common} == {key: expected[0][key] for key in common}
    assert found[1] == expected[1]


@pytest.mark.faults
def test_undisturbed_twice_nothing_differs(grid: Path, undisturbed: tuple[Picture, str], tmp_path: Path) -> None:
    assert_equal(grid, run(grid, str(tmp_path / "store")), undisturbed)


@pytest.mark.faults
def test_half_a_second_for_every_request_changes_nothing(
    grid: Path, undisturbed: tuple[Picture, str], s3: S3Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = FaultyProxy(s3.port, delay=0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", slow.endpoint)
    try:
        assert_equal(grid, run(grid, s3.fresh_url()), undisturbed)
    finally:
        slow.close()


def kill(chance: random.Random, driver: subprocess.Popen[bytes], store: Path) -> str:
    """Kill the driver, its jobs, or both; return what was killed."""
    jobs = jobs_of(store)
    what = chance.choice(["driver", "job", "all"] if jobs else ["driver"])
    for pid in jobs if what == "all" else [chance.choice(jobs)] if what == "job" else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if what != "job":
        driver.kill()
        driver.wait()
    return what


def run_with_kills(chance: random.Random, grid: Path, store: Path, limit: int, longest: float) -> int:
    """Run the grid in `store` with up to `limit` kills at random moments; return how many there were."""
    killed = 0
    command = [sys.executable, "-m", "orchestrator", *arguments("run", grid, str(store))]
    while killed < limit:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while killed < limit and driver.poll() is None:
            time.sleep(chance.uniform(0.0, longest))
            if driver.poll() is None:
                killed += 1
                print(f"kill {killed}: {kill(chance, driver, store)}")
        if driver.poll() == 0:
            break
        if killed == limit:
            driver.kill()
            driver.wait()
        command[3] = "resume"
    moegrid(*arguments("resume", grid, str(store)))
    return killed


@pytest.mark.faults
def test_kills_at_random_moments_change_nothing(grid: Path, undisturbed: tuple[Picture, str], tmp_path: Path) -> None:
    seed = int(os.environ.get("MOEGRID_TEST_SEED", time.time_ns() % 2**32))
    print(f"MOEGRID_TEST_SEED={seed}")
    chance = random.Random(seed)
    killed = 0
    for number in itertools.count():
        store = tmp_path / f"store-{number}"
        # Early moments first, then ever later ones, so that every part of a run is met.
        killed += run_with_kills(chance, grid, store, KILLS - killed, longest=4.0 + 4.0 * number)
        assert_equal(grid, (picture(str(store)), table(grid, str(store))), undisturbed)
        if killed == KILLS:
            break
