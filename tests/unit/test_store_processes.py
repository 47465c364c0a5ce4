"""Many processes on one folder: exactly one winner, and SIGKILL at any write leaves a store that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.store import Store
from tests.faults.objects import COMMIT_SEQUENCE_WRITES
from tests.processes import ROOT, race

KEY = "a" * 64


def test_of_sixteen_claimers_one_wins(tmp_path: Path) -> None:
    code = "print(sum(store.claims.claim(f's{i}', f'{me}-0', 60) is not None for i in range(20)))"
    won = race(code, str(tmp_path), 16)
    assert sum(map(int, won)) == 20
    owners = Store.open(str(tmp_path)).claims.states()
    assert len(owners) == 20
    assert all(state.token == 1 for state in owners.values())


def test_compare_and_swap_loses_no_increment(tmp_path: Path) -> None:
    Store.open(str(tmp_path)).objects.create("counter", b"0")
    code = """
done = 0
while done < 25:
    data, version = store.objects.get_versioned("counter")
    done += store.objects.replace("counter", b"%d" % (int(data) + 1), version)
"""
    race(code, str(tmp_path), 8)
    assert Store.open(str(tmp_path)).objects.get("counter") == b"200"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(COMMIT_SEQUENCE_WRITES))
def test_sigkill_at_any_write_of_a_commit_leaves_all_or_nothing(tmp_path: Path, number: int, moment: str) -> None:
    url = str(tmp_path / "store")
    Store.open(url)
    command = [sys.executable, "-m", "tests.faults.objects", url]
    killed = subprocess.run(
        [*command, "batch-0", str(number), moment], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    store = Store.open(url)
    if store.artifacts.get(KEY) is not None:
        store.artifacts.verify(KEY)
    before = {entry.path: store.objects.get(entry.path) for entry in store.objects.list("blobs")}
    # The next attempt takes the lease over and finishes.
    state = store.claims.states().get(KEY)
    assert state is None or state.attempt == "batch-0"
    done = subprocess.run([*command, "batch-1", "-1", "never"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = store.artifacts.get(KEY)
    assert manifest is not None
    store.artifacts.verify(KEY)
    assert store.artifacts.read(manifest.blob("state.json")) == b'{"step": 3}'
    for path, data in before.items():
        assert store.objects.get(path) == data, "a blob was overwritten"
