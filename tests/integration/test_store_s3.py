"""The store on a real S3 server: the same promises as in a folder, and a network that fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.node.cache import prune_cache
from jobs.node.context import StageContext
from orchestrator.errors import CorruptBlob, LeaseLost, StoreError
from orchestrator.store import Manifest, Store, index
from orchestrator.store.opening import open_objects
from tests.processes import race
from tests.s3_lab import Proxy, S3Lab
from tests.training import init_work, make_job, prepare, put

KEY = "a" * 64


@pytest.fixture
def store(s3: S3Lab) -> Store:
    return Store.open(s3.fresh_url())


def test_of_sixteen_writers_one_creates(store: Store) -> None:
    code = "print(sum(store.objects.create(f'x/{i}', f'{me}'.encode()) for i in range(20)))"
    assert sum(map(int, race(code, store.url, 16))) == 20


def test_of_sixteen_claimers_one_wins_even_an_expired_lease(store: Store) -> None:
    for number in range(10):
        store.claims.claim(f"s{number}", "old-0", ttl=0.0)
    code = "print(sum(store.claims.claim(f's{i}', f'{me}-0', 600) is not None for i in range(10)))"
    assert sum(map(int, race(code, store.url, 16))) == 10
    assert {state.token for state in store.claims.states().values()} == {2}


def test_one_process_enters_and_a_stalled_one_is_fenced(store: Store) -> None:
    store.claims.claim("stage", "a-0", ttl=0.0)
    code = """
from orchestrator.errors import LeaseLost
try:
    store.claims.enter("stage", "a-0")
    print(1)
except LeaseLost:
    print(0)
"""
    assert sum(map(int, race(code, store.url, 8))) == 1
    stalled = store.claims.claim("stage", "b-0", ttl=0.0)
    assert stalled is not None
    assert store.claims.claim("stage", "c-0", ttl=60) is not None
    with pytest.raises(LeaseLost):
        store.claims.check(stalled)


def test_renewals_with_equal_fields_do_not_confuse_versions(store: Store) -> None:
    lease = store.claims.claim("stage", "a-0", 60)
    assert lease is not None
    versions = set()
    for _ in range(5):
        store.claims.renew(lease)
        versions.add((store.objects.get_versioned("claims/stage.json") or (b"", ""))[1])
    assert len(versions) == 5


def test_leases_age_by_the_servers_clock(store: Store) -> None:
    lease = store.claims.claim("stage", "a-0", ttl=3)
    assert lease is not None
    assert store.claims.states()["stage"].live
    time.sleep(4.5)  # the server's times are whole seconds
    assert not store.claims.states()["stage"].live
    store.claims.renew(lease)
    assert store.claims.states()["stage"].live


def test_a_large_blob_goes_up_in_parts_and_comes_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom((20 << 20) + 7))
    blob = store.artifacts.write_blob("a-0", "weights.safetensors", source)
    manifest = store.artifacts.commit(Manifest(key=KEY, kind="train", spec={}, blobs=(blob,), attempt="a-0"))
    assert blob.size == source.stat().st_size
    store.artifacts.verify(KEY)
    assert store.artifacts.fetch(manifest, blob.name, tmp_path / "out").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
def test_damage_is_found_and_healed(store: Store, how: str) -> None:
    data = os.urandom(1000)
    blob = store.artifacts.write_blob("a-0", "x", data)
    store.artifacts.commit(Manifest(key=KEY, kind="data", spec={}, blobs=(blob,), attempt="a-0"))
    if how == "gone":
        store.objects.delete(blob.path)
    else:
        store.objects.put(blob.path, data[:-1] if how == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CorruptBlob, match="x"):
        store.artifacts.verify(KEY)
    assert store.artifacts.heal(KEY)
    assert store.artifacts.keys() == set()
    again = Manifest(
        key=KEY, kind="data", spec={}, blobs=(store.artifacts.write_blob("b-0", "x", data),), attempt="b-0"
    )
    assert store.artifacts.commit(again).generation == 1
    store.artifacts.verify(KEY)


def test_listings_longer_than_a_page_are_complete(store: Store) -> None:
    keys = [f"{number:064x}" for number in range(1100)]
    store.objects.parallel(lambda key: store.artifacts.commit(Manifest(key=key, kind="data", spec={})), keys)
    assert store.artifacts.keys() == set(keys)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_a_wrong_secret_is_refused_at_once_and_never_shown(
    s3: S3Lab, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "planted-secret-value")
    with pytest.raises(StoreError, match="refused the credentials") as caught:
        Store.open(s3.fresh_url(), patience=100_000)  # with retries this would not end
    assert caught.value.exit_code == 3
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    assert "planted-secret-value" not in str(caught.value)


def test_keys_may_come_from_the_standard_files(s3: S3Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, secret = (os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StoreError, match="no credentials were found"):
        Store.open(s3.fresh_url(), patience=2)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    Store.open(s3.fresh_url())


def test_a_bucket_that_does_not_exist_is_named(s3: S3Lab) -> None:
    with pytest.raises(StoreError, match="the bucket does not exist"):
        Store.open("s3://no-such-bucket/x", patience=2)


def test_an_unreachable_endpoint_is_given_up_after_the_patience(s3: S3Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="could not be reached") as caught:
        Store.open(s3.fresh_url(), patience=2)
    assert time.monotonic() - begin < 25
    assert caught.value.exit_code == 3
    assert "AWS_ENDPOINT_URL" in caught.value.hint


def test_work_goes_on_when_the_server_comes_back(s3: S3Lab, proxy: Proxy) -> None:
    store = Store.open(s3.fresh_url(), patience=20)
    store.objects.put("x", b"1")
    restored = threading.Event()

    def restore() -> None:
        restored.set()
        proxy.restore()

    proxy.cut()
    threading.Timer(1.5, restore).start()
    assert store.objects.create("y", b"2")
    assert restored.is_set(), "the server answered while it was cut off"
    assert store.objects.get("x") == b"1"
    assert store.claims.claim("stage", "a-0", 60) is not None


def test_a_cut_server_gives_a_store_error_within_the_patience(s3: S3Lab, proxy: Proxy) -> None:
    store = Store.open(s3.fresh_url(), patience=2)
    proxy.cut()
    for action in (
        lambda: store.objects.get("x"),
        lambda: store.objects.put("x", b""),
        lambda: store.objects.create("x", b""),
        lambda: list(store.objects.list("artifacts")),
    ):
        begin = time.monotonic()
        with pytest.raises(StoreError, match="could not be reached"):
            action()
        assert time.monotonic() - begin < 25


def test_a_lost_answer_does_not_make_the_winner_a_loser(s3: S3Lab) -> None:
    """The server wrote the object, the connection broke, and the retry finds the object there: it is our own."""
    objects = open_objects(s3.fresh_url(), patience=10)
    import obstore

    genuine, calls = obstore.put, []

    def put_and_lose_the_answer(*args: object, **options: object) -> object:
        calls.append(args)
        result = genuine(*args, **options)
        if len(calls) == 1:
            raise obstore.exceptions.GenericError("connection reset")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put", put_and_lose_the_answer)
        assert objects.create("x", b"nonce-1")
        assert len(calls) == 2
        calls.clear()
        _, version = objects.get_versioned("x") or (b"", "")
        assert objects.replace("x", b"nonce-2", version)
        assert len(calls) == 2
    assert not objects.create("x", b"nonce-3")


def test_an_answer_lost_on_the_wire_does_not_make_the_winner_a_loser(s3: S3Lab, proxy: Proxy) -> None:
    store = Store.open(s3.fresh_url(), patience=10)
    for number in range(3):
        proxy.swallow = 1
        assert store.objects.create(f"x{number}", b"nonce")
        _, version = store.objects.get_versioned(f"x{number}") or (b"", "")
        proxy.swallow = 1
        assert store.objects.replace(f"x{number}", b"other nonce", version)
        assert proxy.swallow == 0
    assert not store.objects.create("x0", b"late")


def test_an_upload_that_breaks_off_leaves_no_object(s3: S3Lab, proxy: Proxy, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(os.urandom(30 << 20))
    store = Store.open(s3.fresh_url(), patience=2)
    proxy.limit = 1 << 20
    with pytest.raises(StoreError):
        store.artifacts.write_blob("a-0", "weights", source)
    proxy.limit = None
    assert list(store.objects.list("blobs")) == []
    blob = store.artifacts.write_blob("a-0", "weights", source)
    store.artifacts.verify_blob(blob)


def test_the_index_of_a_bucket_is_believed_only_for_the_manifests_it_was_read_from(store: Store) -> None:
    """A bucket's times have whole seconds: what is younger is read again until it can be told from a later one."""
    names = [f"{number:064x}" for number in range(6)]
    for name in names:
        store.artifacts.commit(Manifest(key=name, kind="evaluate", spec={}, attempt="a-0", metrics={"x": 1.0}))
    store.index.many(names)
    store.index.save()
    assert not list(store.objects.list("index")), "too young"
    time.sleep(index.SETTLED_SECONDS + 1.1)
    store.index.many(names)
    store.index.save()
    store.artifacts.discard(names[0])
    store.artifacts.discard(names[1])
    store.artifacts.commit(Manifest(key=names[1], kind="evaluate", spec={}, attempt="a-0", metrics={"x": 2.0}))
    read: list[str] = []
    reader = Store.peek(store.url)
    real = reader.objects.get

    def counted(path: str) -> bytes | None:
        read.append(path)
        return real(path)

    reader.objects.get = counted  # type: ignore[method-assign]
    found = reader.index.many(names)
    assert found.keys() == set(names[1:])
    assert found[names[1]].metrics == {"x": 2.0}
    assert {path for path in read if path.startswith("artifacts")} == {f"artifacts/{names[1]}.json"}
    (entry,) = store.objects.list("index")
    store.objects.put(entry.path, b"damaged")
    assert Store.peek(store.url).index.many(names).keys() == set(names[1:])


def test_a_node_downloads_a_blob_once_for_all_its_ranks(
    s3: S3Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path / "cache"))
    store, body = prepare(s3.fresh_url()), os.urandom(9_000_000)
    state = put(store, "large", "data", {"weights.safetensors": body}, {})
    jobs = [make_job(store, [replace(init_work(), seed=seed)], f"a-{seed}") for seed in range(4)]
    received: list[int] = []
    chunks = store.objects.chunks

    def counting(path: str) -> Iterator[bytes]:
        for piece in chunks(path) or ():
            received.append(len(piece))
            yield piece

    monkeypatch.setattr(store.objects, "chunks", counting)
    with ThreadPoolExecutor(len(jobs)) as ranks:
        fetched = list(ranks.map(lambda job: StageContext(job, "stage").fetch(state, "weights.safetensors"), jobs))
    assert {path.read_bytes() for path in fetched} == {body}
    assert sum(received) == len(body)
    prune_cache(tmp_path / "cache" / "blobs", keep=tmp_path, limit=0)
    assert fetched[0].exists(), "a job may be about to open it"
    # A cached file that is damaged is none: it is downloaded once more, and once alone.
    fetched[0].write_bytes(body[:-1] + b"x")
    for job in jobs:
        job.files.clear()
    with ThreadPoolExecutor(len(jobs)) as ranks:
        fetched = list(ranks.map(lambda job: StageContext(job, "stage").fetch(state, "weights.safetensors"), jobs))
    assert {path.read_bytes() for path in fetched} == {body}
    assert sum(received) == 2 * len(body)
