"""Objects: create and replace are atomic, nothing half-written is seen, failures say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Objects, Store
from orchestrator.store.opening import open_objects


@pytest.fixture(params=["folder", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "a store"
    return {"folder": str(folder), "file": folder.as_uri(), "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


@pytest.fixture
def objects(url: str) -> Objects:
    return open_objects(url)


def test_create_writes_once(objects: Objects) -> None:
    assert objects.create("a/b.json", b"first")
    assert not objects.create("a/b.json", b"second")
    assert objects.get("a/b.json") == b"first"


def test_an_absent_object_is_none_and_deleting_it_is_no_error(objects: Objects) -> None:
    assert objects.get("no/such") is None
    assert objects.get_versioned("no/such") is None
    assert objects.chunks("no/such") is None
    assert list(objects.list("no")) == []
    objects.delete("no/such")


def test_replace_takes_only_the_version_that_was_read(objects: Objects) -> None:
    objects.create("x", b"one")
    _, version = objects.get_versioned("x") or (b"", "")
    assert objects.replace("x", b"two", version)
    assert not objects.replace("x", b"three", version)
    assert objects.get("x") == b"two"
    assert not objects.replace("absent", b"new", version)
    assert objects.get("absent") is None


def test_a_version_does_not_return_when_a_file_is_replaced_within_a_clock_tick(objects: Objects) -> None:
    objects.create("x", b"0000")
    _, stale = objects.get_versioned("x") or (b"", "")
    for number in range(1, 50):
        _, version = objects.get_versioned("x") or (b"", "")
        assert objects.replace("x", b"%04d" % number, version)
        assert not objects.replace("x", b"lost", stale)


def test_list_is_deep_sorted_and_by_folder(objects: Objects) -> None:
    for path in ("a/2", "a/1", "a/b/c", "ab/1"):
        objects.put(path, b"12")
    entries = list(objects.list("a"))
    assert sorted(entry.path for entry in entries) == ["a/1", "a/2", "a/b/c"]
    assert {entry.size for entry in entries} == {2}
    assert all(abs(entry.modified - objects.now()) < 60 for entry in entries)


def test_what_is_uploaded_keeps_every_byte(objects: Objects, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 << 20))
    size, sha256 = objects.upload("blobs/a/x", source)
    assert b"".join(objects.chunks("blobs/a/x") or ()) == source.read_bytes()
    assert size == 9 << 20
    assert len(sha256) == 64
    assert objects.chunks("blobs/a/y") is None


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a/.hidden", "a\nb", "a/..", "~/x"])
def test_paths_cannot_leave_the_store(objects: Objects, path: str) -> None:
    for action in (objects.get, objects.delete, lambda p: objects.put(p, b""), lambda p: objects.create(p, b"")):
        with pytest.raises(StoreError, match="illegal object name"):
            action(path)


def test_now_goes_forward_and_ignores_the_hosts_wall_clock(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    before = objects.now()
    monkeypatch.setattr("time.time", lambda: 12345.0)
    assert 0 <= objects.now() - before < 60


def test_memory_is_shared_by_name_within_a_process() -> None:
    name = uuid.uuid4().hex
    open_objects(f"memory://{name}").put("x", b"1")
    assert open_objects(f"memory://{name}").get("x") == b"1"
    assert open_objects(f"memory://{name}2").get("x") is None


def test_what_a_killed_writer_leaves_is_never_listed_and_swept_later(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path))
    objects.put("a/x", b"1")
    stray = tmp_path / ".moegrid" / "tmp" / "1-dead"
    stray.write_bytes(b"half")
    assert [entry.path for entry in objects.list("")] == ["a/x"]
    assert objects.sweep(objects.now() - 3600) == 0
    assert objects.sweep(objects.now() + 1) == 1
    assert not stray.exists()


def test_an_upload_never_overwrites_in_a_folder(tmp_path: Path) -> None:
    objects = open_objects(str(tmp_path / "s"))
    source = tmp_path / "source"
    source.write_bytes(b"1")
    objects.upload("blobs/x", source)
    source.write_bytes(b"2")
    with pytest.raises(StoreError, match="exists already"):
        objects.upload("blobs/x", source)
    assert objects.get("blobs/x") == b"1"


def test_a_full_disk_is_a_store_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StoreError, match="the disk is full") as caught:
        store.create_json("a/x.json", {})
    assert caught.value.exit_code == 3
    assert "moegrid gc" in caught.value.hint
    monkeypatch.undo()
    assert store.get_json("a/x.json") is None
    assert list((tmp_path / ".moegrid" / "tmp").iterdir()) == []


def test_a_file_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="a file stands where a folder should be"):
            Store.open(str(url))
    store = Store.open(str(tmp_path / "store"))
    (tmp_path / "store" / "artifacts").write_text("")
    with pytest.raises(StoreError, match="a file stands where a folder should be"):
        store.create_json("artifacts/x.json", {})
    with pytest.raises(StoreError, match="a file stands where a folder should be"):
        store.artifacts.keys()


def test_an_unwritable_folder_is_a_store_error() -> None:
    with pytest.raises(StoreError) as caught:
        Store.open("/proc/moegrid-store")
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize(
    "url, message",
    [
        ("", "no store was given"),
        ("gs://bucket", "unknown kind of store: gs://"),
        ("s3://", "no bucket"),
        ("s3://key:planted-secret@bucket/x", "must not hold credentials"),
        ("s3://bucket/x?secret=planted-secret", "must not hold credentials"),
    ],
)
def test_a_bad_url_says_so_and_repeats_no_secret(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)
    assert "planted-secret" not in str(caught.value)


def test_a_store_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema": 99}')
    with pytest.raises(StoreError, match="schema 99"):
        Store.open(str(tmp_path))


def test_a_store_that_overwrites_instead_of_refusing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    objects = open_objects(str(tmp_path))
    monkeypatch.setattr(objects, "create", lambda path, data: True)
    with pytest.raises(StoreError, match="cannot be used as a store"):
        Store(objects)


def test_a_folder_store_needs_no_client_library(tmp_path: Path) -> None:
    code = """
import sys
from orchestrator.store import Store
Store.open(sys.argv[1])
print("obstore" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
