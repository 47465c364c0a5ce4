"""The index of manifests saves reads; old, partial, damaged or gone it never costs or invents a result."""

from __future__ import annotations

import collections
import json
import threading
import uuid
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Manifest, Objects, Store, index
from orchestrator.store.retention import collect, plan_gc
from tests.grid_store import key
from tests.processes import race


class Gets:
    """Counts what is read of a store, by its folder."""

    def __init__(self, store: Store) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        # In memory `get` is a `read`.
        self._of(store.objects, "read")
        if type(store.objects).get is not Objects.get:
            self._of(store.objects, "get")

    def _of(self, objects: Objects, name: str) -> None:
        real = getattr(objects, name)

        def counted(path: str) -> object:
            self.counts[path.split("/")[0]] += 1
            return real(path)

        setattr(objects, name, counted)

    def take(self) -> dict[str, int]:
        found, self.counts = dict(self.counts), collections.Counter()
        return {name: found[name] for name in ("artifacts", "index") if name in found}


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"


def manifest(name: str, value: float = 1.0, **fields: object) -> Manifest:
    """Return a manifest without blobs; ten runs of one host have equal provenances."""
    made = Manifest(
        key=key(name),
        kind="evaluate",
        spec={"suite": "lm"},
        parents={key("parent"): "d" * 64},
        numerics={"threads": 2},
        provenance={"host": "node", "git": "abc"},
        attempt="batch-0",
        metrics={"bits_per_byte": value},
        info={"n": {"bits_per_byte": 3}, "seconds": 2.5},
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def fill(url: str, *names: str) -> Store:
    store = Store.open(url)
    for number, name in enumerate(names):
        blobs = (store.artifacts.write_blob("batch-0", "items.parquet", name.encode()),)
        store.artifacts.commit(manifest(name, float(number), blobs=blobs))
    return store


def truth(store: Store) -> dict[str, Manifest]:
    """Return what the manifests themselves say."""
    return {name: replace(m, spec={}) for name, m in store.artifacts.many(store.artifacts.keys()).items()}


def indexed(url: str, *names: str) -> Store:
    store = fill(url, *names)
    store.index.many(store.artifacts.keys())
    store.index.save()
    return store


NAMES = tuple(f"n{number}" for number in range(9))


def test_a_manifest_comes_from_the_index_as_it_was(url: str) -> None:
    store = indexed(url, *NAMES)
    later = Store.open(url)
    gets = Gets(later)
    assert later.index.many(store.artifacts.keys()) == truth(store)
    assert gets.take() == {"index": 1}
    assert later.index.many(store.artifacts.keys()) == truth(store)
    assert gets.take() == {}, "what was read is not read again"


@pytest.mark.parametrize("made", [indexed, fill])
def test_a_reader_that_wants_few_words_keeps_no_others(url: str, made: Callable[..., Store]) -> None:
    store = made(url, *NAMES)
    reader = Store.open(url)
    reader.index.keep_only(["seconds"])
    for _ in range(2):
        found = reader.index.many(store.artifacts.keys())
        assert {name: m.metrics for name, m in found.items()} == {k: m.metrics for k, m in truth(store).items()}
        assert all((m.info, m.blobs, m.provenance) == ({"seconds": 2.5}, (), {}) for m in found.values())
    reader.index.save()
    assert Store.open(url).index.many(store.artifacts.keys()) == truth(store), "the index holds all words still"


def test_only_what_is_new_is_read(url: str) -> None:
    indexed(url, *NAMES)
    watching = Store.open(url)
    gets = Gets(watching)
    wanted = {key(name) for name in (*NAMES, "later", "never")}
    assert len(watching.index.many(wanted)) == len(NAMES)
    fill(url, "later")
    gets.take()
    assert watching.index.many(wanted)[key("later")].metrics == {"bits_per_byte": 0.0}
    assert gets.take() == {"artifacts": 1}


def test_without_an_index_the_manifests_are_read(url: str) -> None:
    store = fill(url, *NAMES)
    gets = Gets(store)
    assert store.index.many(store.artifacts.keys()) == truth(store)
    assert gets.take()["artifacts"] == 2 * len(NAMES)
    store.index.save()
    for entry in list(store.objects.list(index.FOLDER)):
        store.objects.delete(entry.path)
    assert Store.open(url).index.many(store.artifacts.keys()) == truth(store)


def test_what_was_discarded_or_made_again_is_never_taken_from_the_index(url: str) -> None:
    store = indexed(url, *NAMES)
    store.artifacts.discard(key("n0"))
    store.artifacts.discard(key("n1"))
    store.artifacts.commit(manifest("n1", 42.0))
    for reader in (store, Store.open(url)):
        found = reader.index.many({key(name) for name in NAMES})
        assert key("n0") not in found, "a result that is gone"
        assert found[key("n1")].metrics == {"bits_per_byte": 42.0}
        assert found == truth(reader)


def test_what_gc_deletes_is_gone_from_every_reader(url: str) -> None:
    store = indexed(url, *NAMES)
    collect(store, plan_gc(store, {key(name) for name in NAMES[1:]}, grace_seconds=0.0), lambda: set())
    found = Store.open(url).index.many({key(name) for name in NAMES})
    assert found == truth(store)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "other version"])
def test_a_damaged_index_costs_reads_alone(url: str, damage: str) -> None:
    store = indexed(url, *NAMES)
    (entry,) = store.objects.list(index.FOLDER)
    data = store.objects.get(entry.path)
    assert data is not None
    changed = {
        "cut": data[:-7],
        "flipped": data[:40] + bytes([data[40] ^ 1]) + data[41:],
        "empty": b"",
        "foreign": b"%PDF-1.4",
        "other version": zlib.compress(json.dumps({"parts": [], "rows": [[1, 2.0]]}).encode()),
    }[damage]
    store.objects.put(entry.path, changed)
    store.objects.put(f"{index.FOLDER}/README", b"not a segment")
    assert Store.open(url).index.many(store.artifacts.keys()) == truth(store)


def test_a_row_whose_bytes_were_forged_is_not_believed(url: str) -> None:
    """A segment is known by its content: one that says something else under a known name does not count."""
    store = indexed(url, *NAMES)
    (entry,) = store.objects.list(index.FOLDER)
    body = json.loads(zlib.decompress(store.objects.get(entry.path) or b""))
    text = json.dumps(body).replace('"bits_per_byte": 0.0', '"bits_per_byte": 9.9')
    store.objects.put(entry.path, zlib.compress(text.encode()))
    assert Store.open(url).index.many(store.artifacts.keys()) == truth(store)


def test_a_damaged_manifest_is_made_again_whatever_the_index_says(url: str) -> None:
    store = indexed(url, *NAMES)
    path = f"artifacts/{key('n3')}.json"
    store.objects.put(path, (store.objects.get(path) or b"").replace(b"bits_per_byte", b"BITS_per_byte"))
    reader = Store.open(url)
    assert key("n3") not in reader.index.many({key(name) for name in NAMES})
    assert key("n3") in reader.artifacts.damaged({key(name) for name in NAMES})


def test_a_writer_killed_at_any_moment_leaves_what_the_next_finishes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging dies after each of its writes and deletions in turn; readers see every result each time."""
    monkeypatch.setattr(index, "MOST_SMALL", 3)
    store = Store.open(url)
    for name in NAMES:
        fill(url, name)
        store.index.note([key(name)])
        store.index.save()
    assert len(list(store.objects.list(index.FOLDER))) <= 4, "small segments are merged"
    for die_at in range(1, 7):
        writer = Store.open(url)
        for number in range(4):
            extra = f"x{die_at}-{number}"
            fill(url, extra)
            writer.index.note([key(extra)])
            with _killed(writer.objects, die_at if number == 3 else 99):
                writer.index.save()
        reader = Store.open(url)
        assert reader.index.many(reader.artifacts.keys()) == truth(reader), die_at


class _killed:
    """Raises from the n-th write or deletion on, as a process that is gone."""

    def __init__(self, objects: Objects, at: int) -> None:
        self._objects, self._left = objects, at
        self._real = {name: getattr(objects, name) for name in ("create", "delete")}

    def __enter__(self) -> None:
        for name, real in self._real.items():

            def method(*arguments: object, real: object = real) -> object:
                self._left -= 1
                if self._left < 0:
                    raise StoreError("killed")
                return real(*arguments)

            setattr(self._objects, name, method)

    def __exit__(self, *error: object) -> None:
        for name, real in self._real.items():
            setattr(self._objects, name, real)


def test_two_drivers_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    url = str(tmp_path / "store")
    Store.open(url)
    code = """
from orchestrator.store import index
from tests.unit.test_store_index import fill, key
index.SETTLED_SECONDS, index.MOST_SMALL = -1.0, 2
for number in range(12):
    name = f"{me}-{number}"
    fill(store.url, name)
    store.index.note([key(name)])
    store.index.save()
    store.index.many(store.artifacts.keys())
print(1)
"""
    assert sum(map(int, race(code, url, 3))) == 3
    reader = Store.open(url)
    assert len(truth(reader)) == 36
    assert reader.index.many(reader.artifacts.keys()) == truth(reader)


def test_a_reader_beside_a_writer_that_merges_sees_every_result(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MOST_SMALL", 1)
    store = indexed(url, *NAMES)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            fill(url, f"w{number}")
            store.index.note([key(f"w{number}")])
            store.index.save()
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(15):
            assert len(Store.open(url).index.many({key(name) for name in NAMES})) == len(NAMES)
    finally:
        stop.set()
        thread.join()


def test_a_young_manifest_is_not_written_down_yet(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the resolution of a store's clock another manifest can take its place and look the same."""
    monkeypatch.setattr(index, "SETTLED_SECONDS", 60.0)
    store = indexed(url, *NAMES)
    assert not list(store.objects.list(index.FOLDER))
    gets = Gets(store)
    assert store.index.many({key("n1")}) == {key("n1"): truth(store)[key("n1")]}
    assert gets.take()["artifacts"] >= 1


def test_a_store_that_is_read_alone_gets_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    url = str(tmp_path / "store")
    fill(url, *NAMES)
    before = sorted(str(path) for path in (tmp_path / "store").rglob("*"))
    reader = Store.peek(url)
    assert len(reader.index.many({key(name) for name in NAMES})) == len(NAMES)
    reader.index.save()
    assert sorted(str(path) for path in (tmp_path / "store").rglob("*")) == before


def test_an_index_that_lacks_much_is_made_again(url: str) -> None:
    store = fill(url, *NAMES)
    store.index.rebuild(store.artifacts.keys(), len(NAMES))
    gets = Gets(later := Store.open(url))
    later.index.rebuild(store.artifacts.keys(), len(NAMES))
    assert gets.take() == {}, "it is there"
    assert len(later.index.many(store.artifacts.keys())) == len(NAMES)
    assert gets.take() == {"index": 1}
