"""Artifacts: a manifest is the commit, blobs are never overwritten, damage is named and repaired by generation."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from pathlib import Path

import pytest

from orchestrator.errors import CorruptBlob, MoegridError, StoreError
from orchestrator.store import Blob, Manifest, Store

KEY = "a" * 64
CHILD = "b" * 64


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def make(
    store: Store, key: str = KEY, data: bytes = b"weights", attempt: str = "batch-0", **fields: object
) -> Manifest:
    blobs = (store.artifacts.write_blob(attempt, "weights.safetensors", data),)
    return Manifest(key=key, kind="train", spec={"steps": 3}, blobs=blobs, attempt=attempt, **fields)  # type: ignore[arg-type]


def test_an_artifact_exists_only_once_its_manifest_does(store: Store) -> None:
    manifest = make(store)
    assert store.artifacts.keys() == set()
    assert store.artifacts.get(KEY) is None
    committed = store.artifacts.commit(manifest)
    assert store.artifacts.keys() == {KEY}
    assert store.artifacts.get(KEY) == committed
    assert store.artifacts.many([KEY, CHILD]) == {KEY: committed}


def test_a_manifest_comes_back_as_it_was(store: Store) -> None:
    manifest = make(
        store,
        parents={CHILD: "c" * 64},
        numerics={"threads": 2},
        provenance={"host": "né"},
        metrics={"val_loss": 0.1 + 0.2},
        info={"counts": {"items": 3}, "list": [1, 2]},
    )
    committed = store.artifacts.commit(manifest)
    assert Manifest.from_bytes(committed.to_bytes()) == committed
    assert committed.created > 1e9


def test_the_loser_of_a_race_gets_the_winners_manifest(store: Store) -> None:
    first = store.artifacts.commit(make(store, data=b"first", attempt="batch-0"))
    second = store.artifacts.commit(make(store, data=b"second", attempt="batch-1"))
    assert second == first
    assert store.artifacts.read(second.blob("weights.safetensors")) == b"first"


def test_blobs_are_never_overwritten(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"2")
    other = Store(store.objects)  # another process of the same attempt
    blobs = [
        store.artifacts.write_blob("batch-0", "x", b"1"),
        store.artifacts.write_blob("batch-0", "x", source),
        other.artifacts.write_blob("batch-0", "x", b"3"),
        store.artifacts.write_blob("batch-0", "deep/x", b"4"),
    ]
    assert len({blob.path for blob in blobs}) == 4
    assert all(blob.path.startswith("blobs/batch-0/") and blob.path.endswith("/x") for blob in blobs)
    assert [store.artifacts.read(blob) for blob in blobs] == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("attempt, name", [("..", "x"), ("a/../..", "x"), ("a", "../x"), ("a", "/x"), ("a", "")])
def test_blob_names_cannot_escape(store: Store, attempt: str, name: str) -> None:
    with pytest.raises(StoreError, match="illegal object name"):
        store.artifacts.write_blob(attempt, name, b"")


def damage(store: Store, blob: Blob, how: str) -> None:
    data = store.artifacts.read(blob)
    flipped = data[:3] + bytes([data[3] ^ 1]) + data[4:]
    if how == "gone":
        store.objects.delete(blob.path)
    else:
        store.objects.put(blob.path, {"flipped": flipped, "truncated": data[:-1], "empty": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "gone"])
def test_a_damaged_blob_is_named_by_every_reader(store: Store, how: str, tmp_path: Path) -> None:
    manifest = store.artifacts.commit(make(store))
    manifest = store.artifacts.get(KEY) or manifest
    blob = manifest.blob("weights.safetensors")
    damage(store, blob, how)
    readers = [
        lambda: store.artifacts.read(blob),
        lambda: store.artifacts.verify_blob(blob),
        lambda: store.artifacts.verify(KEY),
        lambda: store.artifacts.fetch(manifest, blob.name, tmp_path / "out"),
    ]
    for reader in readers:
        with pytest.raises(CorruptBlob) as caught:
            reader()
        assert caught.value.artifact == KEY
        assert caught.value.path == blob.path
    assert not list((tmp_path / "out").glob("*"))


def test_a_damaged_artifact_is_healed_by_making_it_again(store: Store) -> None:
    before = store.artifacts.commit(make(store))
    assert not store.artifacts.heal(KEY)
    damage(store, before.blobs[0], "flipped")
    assert store.artifacts.heal(KEY)
    assert store.artifacts.keys() == set()
    assert store.artifacts.get(KEY) is None
    after = store.artifacts.commit(make(store, attempt="batch-1"))
    assert after.generation == before.generation + 1
    assert after.digest == before.digest, "equal bits leave no trace, so no child becomes stale"
    store.artifacts.verify(KEY)


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_a_damaged_manifest_is_an_absent_artifact(store: Store, how: str) -> None:
    data = store.artifacts.commit(make(store)).to_bytes()
    bad = data[:50] + b"#" + data[51:] if how == "flip" else data[:-20]
    store.objects.put(f"artifacts/{KEY}.json", bad)
    assert store.artifacts.many([KEY]) == {}
    assert store.artifacts.keys() == set()
    assert store.artifacts.commit(make(store, attempt="batch-1")).attempt == "batch-1"
    assert store.artifacts.keys() == {KEY}


def test_discard_spares_what_another_attempt_has_made_meanwhile(store: Store) -> None:
    store.artifacts.commit(make(store))
    assert not store.artifacts.discard(KEY, attempt="batch-9")
    assert store.artifacts.keys() == {KEY}
    assert store.artifacts.discard(KEY, attempt="batch-0")
    assert not store.artifacts.discard(KEY)


def test_children_are_stale_only_if_a_parents_bits_changed(store: Store) -> None:
    parent = store.artifacts.commit(make(store))
    child = store.artifacts.commit(make(store, key=CHILD, parents={KEY: parent.digest}))
    assert store.artifacts.stale([child]) == set()
    store.artifacts.discard(KEY)
    store.artifacts.commit(make(store, attempt="batch-1"))
    assert store.artifacts.stale([child]) == set()
    store.artifacts.discard(KEY)
    assert store.artifacts.stale([child]) == set(), "a parent that is away proves nothing"
    store.artifacts.commit(make(store, data=b"different", attempt="batch-2"))
    assert store.artifacts.stale([child]) == {CHILD}


def test_timings_are_no_part_of_the_bits_that_children_depend_on(store: Store) -> None:
    def state(rows: bytes) -> Manifest:
        blobs = (Blob("weights", "blobs/a/w", 1, "0" * 64), store.artifacts.write_blob("a", "series.json", rows))
        return Manifest(key=KEY, kind="train", spec={}, blobs=blobs)

    assert state(b"fast").digest == state(b"slow").digest


def test_fetch_copies_and_the_name_is_checked(store: Store, tmp_path: Path) -> None:
    manifest = store.artifacts.commit(make(store))
    path = store.artifacts.fetch(manifest, "weights.safetensors", tmp_path / "scratch")
    assert path == tmp_path / "scratch" / "weights.safetensors"
    assert path.read_bytes() == b"weights"
    with pytest.raises(MoegridError, match="has no blob 'other'") as raised:
        store.artifacts.fetch(manifest, "other", tmp_path)
    assert not isinstance(raised.value, StoreError), "it would be tried again"


def shared(store: Store) -> tuple[Manifest, Manifest]:
    """Commit a state and a later one that names its weights, and cut those short."""
    first = store.artifacts.commit(make(store))
    kept = dataclasses.replace(first.blobs[0], name=f"kept-{KEY}/weights.safetensors")
    own = store.artifacts.write_blob("batch-1", "weights.safetensors", b"router")
    later = store.artifacts.commit(Manifest(key=CHILD, kind="train", spec={}, blobs=(own, kept), attempt="batch-1"))
    store.objects.delete(first.blobs[0].path)
    store.objects.create(first.blobs[0].path, b"wei")
    assert store.artifacts.heal(KEY)
    return first, later


def test_what_is_made_again_with_the_same_bytes_lies_where_others_look_for_it(store: Store) -> None:
    first, later = shared(store)
    with pytest.raises(CorruptBlob):
        store.artifacts.verify(CHILD)
    again = store.artifacts.commit(make(store, attempt="batch-2"))
    assert again.generation == 1
    assert [blob.path for blob in again.blobs] == [blob.path for blob in first.blobs]
    store.artifacts.verify(KEY)
    store.artifacts.verify(CHILD)
    assert store.artifacts.get(CHILD) == later, "it is as it was"
    file = store.objects.local_path(first.blobs[0].path)
    committed = store.artifacts.times()[CHILD]
    assert file is None or file.stat().st_mtime <= committed, "it does not look altered"
    assert not list(store.objects.list("repairs"))


def test_a_repair_within_a_folder_needs_no_room_elsewhere(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = shared(store)
    again = make(store, attempt="batch-2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    if store.objects.local_path(first.blobs[0].path) is None:
        # A bucket's files come through this machine.
        with pytest.raises(StoreError, match=r"cannot copy .* to this machine"):
            store.artifacts.commit(again)
        return
    store.artifacts.commit(again)
    store.artifacts.verify(CHILD)


def test_what_is_made_again_with_other_bytes_lies_elsewhere(store: Store) -> None:
    first, _ = shared(store)
    again = store.artifacts.commit(make(store, data=b"WEIGHTS", attempt="batch-2"))
    assert again.blobs[0].path != first.blobs[0].path
    store.artifacts.verify(KEY)
    with pytest.raises(CorruptBlob):
        store.artifacts.verify(CHILD)
    assert not list(store.objects.list("repairs"))


def test_a_repair_whose_record_is_damaged_makes_everything_again(store: Store) -> None:
    first, _ = shared(store)
    store.objects.put(f"repairs/{KEY}.json", b'{"files": [["weights')
    assert store.artifacts.commit(make(store, attempt="batch-2")).blobs[0].path != first.blobs[0].path
    store.artifacts.verify(KEY)
