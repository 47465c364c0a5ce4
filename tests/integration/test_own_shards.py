"""Four ranks of fsdp, each on a node of its own, go on from a state in a bucket: each fetches its own files of it."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from jobs.models.shards import shard_name
from orchestrator.backends.processes import free_place
from orchestrator.errors import EXIT_AWAY, EXIT_DONE
from orchestrator.spec.cell import Resources
from orchestrator.spec.work import TrainWork
from orchestrator.store import Manifest, Store
from tests.s3_lab import S3Lab
from tests.training import EXECUTION, TRAIN, failure, init_work, prepare, run_chain, segments, start, submit

RANKS = 4
FSDP = dataclasses.replace(EXECUTION, engine="fsdp")
LONG = dataclasses.replace(TRAIN, steps=6, accumulation=RANKS)


def run(store: Store, works: Sequence[TrainWork], name: str, caches: Path, code: int = EXIT_DONE) -> list[str]:
    """Run a job of four ranks, each with its own cache as on a node of its own; return what each of them printed."""
    command = submit(store, works, name, resources=Resources(processes=RANKS), execution=FSDP)
    address, port = free_place("127.0.0.1")
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    ranks: list[subprocess.Popen[str]] = []
    for rank in range(RANKS):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MOEGRID_CACHE": str(caches / str(rank))}
        ranks.append(start(command, **place, **own))
    said = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert {rank.returncode for rank in ranks} == {code}, "\n".join(said)
    return said


def made(store: Store, key: str) -> Manifest:
    found = store.artifacts.get(key)
    assert found is not None
    return found


def fetched(caches: Path, rank: int) -> set[str]:
    """Return the checksums of what a rank's node has fetched, by reading it."""
    files = caches.joinpath(str(rank)).glob("blobs/*/*")
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def bits(store: Store, key: str) -> tuple[object, set[tuple[str, str]]]:
    """Return what tells a state's weights and moments from others."""
    manifest = made(store, key)
    moments = {(blob.name, blob.sha256) for blob in manifest.blobs if blob.name.startswith("optimizer")}
    return manifest.info["weights_sha256"], moments


def altered(store: Store, path: str) -> None:
    """Flip a bit of a file of the store."""
    data = bytearray(store.objects.get(path) or b"")
    data[-1] ^= 1
    store.objects.delete(path)
    store.objects.put(path, bytes(data))


def test_each_rank_fetches_its_own_files(s3: S3Lab, tmp_path: Path) -> None:
    (whole,) = segments([("", 0, 6)], LONG)
    first, second = segments([("", 0, 2), ("", 2, 4)], LONG)
    straight, store = (prepare(s3.fresh_url()) for _ in range(2))
    for one in (straight, store):
        run_chain(one, [init_work()], "init")
    run(straight, [whole], "a-0", tmp_path / "straight")
    run(store, [first], "b-0", tmp_path / "first")
    run(store, [second], "b-1", tmp_path / "second")
    run(store, [whole], "b-2", tmp_path / "last")  # begun anew within the segment: a choice that all ranks make
    for name, state in (("second", first.key()), ("last", second.key())):
        manifest = made(store, state)
        shards = {blob.name: blob for blob in manifest.blobs if blob.name.endswith(".safetensors")}
        shared = {name for name in shards if "-shared-" in name}
        assert shared
        for rank in range(RANKS):
            own = {shard_name(kind, rank, RANKS) for kind in ("weights", "optimizer")} | shared
            found = fetched(tmp_path / name, rank)
            assert {name for name, blob in shards.items() if blob.sha256 in found} == own
        small, total = (sum(shards[name].size for name in names) for names in (shared, shards))
        assert small < total / 8
    assert bits(store, whole.key()) == bits(straight, whole.key())


def test_a_rank_that_finds_damage_takes_all_to_an_earlier_state(s3: S3Lab, tmp_path: Path) -> None:
    first, second = segments([("", 0, 2), ("", 2, 4)], LONG)
    (whole,) = segments([("", 0, 6)], LONG)
    store = prepare(s3.fresh_url())
    run_chain(store, [init_work()], "init")
    run(store, [first, second], "a-0", tmp_path / "first")
    before = made(store, second.key())
    altered(store, before.blob(shard_name("optimizer", 3, RANKS)).path)
    run(store, [whole], "a-1", tmp_path / "second")
    assert store.artifacts.get(second.key()) is None, "what is damaged is discarded, to be made again"
    assert bits(store, first.key())
    run(store, [second], "a-2", tmp_path / "third")
    assert bits(store, second.key())[0] == before.info["weights_sha256"]


def test_damage_that_one_rank_alone_meets_is_what_all_end_with(s3: S3Lab, tmp_path: Path) -> None:
    first, second = segments([("", 0, 2), ("", 2, 4)], LONG)
    store = prepare(s3.fresh_url())
    run_chain(store, [init_work()], "init")
    run(store, [first], "a-0", tmp_path / "first")
    before = bits(store, first.key())
    for number, (kind, rank) in enumerate([("optimizer", 3), ("weights", 2)], 1):
        blob = made(store, first.key()).blob(shard_name(kind, rank, RANKS))
        altered(store, blob.path)
        # No rank is in a collective that another one leaves: such an end would be the work's own, by its exit code.
        for words in run(store, [second], f"a-{number}", tmp_path / kind, EXIT_AWAY):
            assert f"error: artifact {first.key()[:12]} is damaged: {blob.path}" in words
        told = failure(store, f"a-{number}")
        assert (told["kind"], told["artifact"], told["stage"]) == ("corrupt", first.key(), second.key())
        if kind == "optimizer":
            altered(store, blob.path)  # as it was
    assert store.artifacts.heal(first.key())
    run(store, [first, second], "a-3", tmp_path / "healed")
    assert bits(store, first.key()) == before
    assert made(store, second.key()).parents[first.key()] == made(store, first.key()).digest
