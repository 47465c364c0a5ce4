"""Writers killed at random moments and a full disk: all or nothing is visible, and nothing is overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Blob, Store
from tests.faults.objects import COMMIT_SEQUENCE_WRITES
from tests.processes import ROOT
from tests.s3_lab import S3Lab

KEY = "a" * 64

WRITER = """
import os, sys, tempfile
from pathlib import Path
from orchestrator.store import *
store, attempt = Store.open(sys.argv[1]), sys.argv[2]
source = Path(sys.argv[3]); source.write_bytes(attempt.encode() * 400_000)
print("ready", flush=True)
for number in range(1000):
    lease = store.claims.claim("shared", attempt, ttl=0.0)
    weights = store.artifacts.write_blob(attempt, "weights", source)
    blobs = (weights, store.artifacts.write_blob(attempt, "state", b"x" * number))
    store.artifacts.commit(Manifest(key=f"{attempt}-{number}", kind="data", spec={}, blobs=blobs, attempt=attempt))
    store.objects.put("heartbeat", b"1" * 5000)
"""


def digests(store: Store) -> dict[str, str]:
    return {
        entry.path: hashlib.sha256(store.objects.get(entry.path) or b"").hexdigest()
        for entry in store.objects.list("blobs")
    }


def kill_writers(url: str, scratch: Path, rounds: int) -> None:
    """Kill a busy writer again and again; after each kill the store holds whole artifacts only."""
    store = Store.open(url)
    known: dict[str, str] = {}
    rng = random.Random(0)
    for number in range(rounds):
        command = [sys.executable, "-c", WRITER, url, f"a{number}-0", str(scratch / "source")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.005, 0.12))
            writer.send_signal(signal.SIGKILL)
        for key in sorted(store.artifacts.keys()):
            store.artifacts.verify(key)
        found = digests(store)
        assert known.items() <= found.items(), "a blob was overwritten or lost"
        known = found
        claim = store.claims.states().get("shared")
        assert claim is None or claim.token >= 1
        assert len(store.objects.get("heartbeat") or b"1" * 5000) == 5000
    assert len(store.artifacts.keys()) > rounds / 2


def test_a_writer_killed_at_random_leaves_whole_artifacts_in_a_folder(tmp_path: Path) -> None:
    kill_writers(str(tmp_path / "store"), tmp_path, rounds=10)


def test_a_writer_killed_at_random_leaves_whole_artifacts_on_s3(s3: S3Lab, tmp_path: Path) -> None:
    kill_writers(s3.fresh_url(), tmp_path, rounds=6)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(COMMIT_SEQUENCE_WRITES))
def test_sigkill_at_any_write_of_a_commit_on_s3(s3: S3Lab, number: int, moment: str) -> None:
    url = s3.fresh_url()
    store = Store.open(url)
    command = [sys.executable, "-m", "tests.faults.objects", url]
    killed = subprocess.run([*command, "batch-0", str(number), moment], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = digests(store)
    done = subprocess.run([*command, "batch-1", "-1", "never"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store.artifacts.verify(KEY)
    assert before.items() <= digests(store).items(), "a blob was overwritten"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_nothing_and_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m"):
        store = Store.open(str(tmp_path / "disk" / "store"))
        written: list[Blob] = []

        def fill() -> None:
            while len(written) < 100:
                written.append(store.artifacts.write_blob("a-0", "weights", os.urandom(200_000)))

        with pytest.raises(StoreError, match="the disk is full") as caught:
            fill()
        assert caught.value.exit_code == 3
        assert len(written) > 5
        for blob in written:
            store.artifacts.verify_blob(blob)
        big = tmp_path / "big"
        big.write_bytes(os.urandom(4 << 20))
        with pytest.raises(StoreError, match="the disk is full"):
            store.artifacts.write_blob("a-0", "big", big)
        assert len(list(store.objects.list("blobs"))) == len(written)
        assert not list((tmp_path / "disk" / "store" / ".moegrid" / "tmp").iterdir())
        store.objects.delete(written[0].path)
        assert store.claims.claim("stage", "a-0", 60) is not None
