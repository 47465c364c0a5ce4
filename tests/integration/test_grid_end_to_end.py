"""Real grids of real jobs through the command line, on made-up text: equal bits whatever way they were made."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import Store
from tests.small_grid import GRID, jobs_of, made_up_text, moegrid, wait_for_training, weights
from tests.store_keys import keys_that_are_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of made-up text."""
    return made_up_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The grid run once, undisturbed."""
    grid = folder / "small.yaml"
    grid.write_text(GRID.format(at="[1.0]", folder=folder))
    store = tmp_path_factory.mktemp("shared") / "store"
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
    return grid, store, weights(grid, store)


def test_no_key_is_a_folder_and_what_others_read_follows_the_umask(shared: tuple[Path, Path, dict[str, Any]]) -> None:
    _, store, _ = shared
    keys = [entry.path for entry in Store.open(str(store)).objects.list("")]
    assert len(keys) > 20
    assert not keys_that_are_folders(keys)
    plain = store.parent / "plain"
    plain.touch()
    files = [path for path in store.parent.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {plain.stat().st_mode}


def test_no_sharing_ends_with_the_same_bits(shared: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    grid, _, expected = shared
    store = tmp_path / "store"
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none", "--no-share", "--no-report")
    found = json.loads(moegrid("status", str(grid), "--store", str(store), "--no-share", "--json"))["cells"]
    assert {cell["name"]: (cell["weights_sha256"], cell["metrics"]) for cell in found} == expected


def test_more_fractions_and_kills_end_with_the_same_bits(
    shared: tuple[Path, Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    _, _, expected = shared
    grid = folder / "small_at.yaml"
    grid.write_text(GRID.format(at="[0.25, 0.5, 1.0]", folder=folder))
    store = tmp_path / "store"
    command = [sys.executable, "-m", "orchestrator", "run", str(grid), "--store", str(store), "--tracking", "none"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_training(store, driver)
    driver.kill()
    driver.wait()
    pids = jobs_of(store)
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    moegrid("resume", str(grid), "--store", str(store), "--tracking", "none", "--no-report")
    assert {name: digest for name, (digest, _) in weights(grid, store).items()} == {
        name: digest for name, (digest, _) in expected.items()
    }


def test_a_second_run_starts_nothing(shared: tuple[Path, Path, dict[str, Any]]) -> None:
    grid, store, _ = shared
    before = sorted(path.name for path in (store / "submissions").iterdir())
    said = moegrid("plan", str(grid), "--store", str(store), "--json", "--exit-code")
    assert json.loads(said)["actions"]["run"] == 0
    moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
    assert sorted(path.name for path in (store / "submissions").iterdir()) == before


def test_a_changed_factor_runs_only_what_depends_on_it(shared: tuple[Path, Path, dict[str, Any]]) -> None:
    grid, store, _ = shared
    arguments = [str(grid), "factors.freeze=[none,router]", "--store", str(store), "--json"]
    phases = {row["phase"]: row["actions"] for row in json.loads(moegrid("plan", *arguments))["phases"]}
    assert phases["prepare"]["run"] == phases["pretrain"]["run"] == 0
    assert (phases["finetune"]["run"], phases["evaluate"]["run"]) == (1, 1)
