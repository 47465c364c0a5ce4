"""A rank fetches those files of a state that hold rows it reads, each verified, and no other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.models.shards import (
    Layout,
    Rows,
    Shards,
    fetch_shards,
    layout_of,
    layouts_to_json,
    shard_name,
    share_of,
    write_pieces,
)
from jobs.node.context import StageContext
from orchestrator.errors import CorruptBlob, MoegridError
from orchestrator.store import Blob, Manifest, Store
from orchestrator.store.manifest import FILES, KEPT
from tests.training import init_work, key, make_job

RANKS = 4
MATRIX = torch.arange(80.0).view(10, 8)
FROZEN = torch.arange(24.0).view(8, 3)
COUNT = torch.tensor(7.0)
STATE = key("state")


def share(rank: int, tensor: Tensor) -> Rows:
    """Return a rank's rows, as FSDP2 cuts them: as many as the first has, the last ones fewer or none."""
    each = -(-len(tensor) // RANKS)
    return Rows(tensor[rank * each : (rank + 1) * each], rank * each, tuple(tensor.shape))


def state_in(store: Store, folder: Path, *, told: dict[str, Layout] | None = None) -> Manifest:
    """Commit a state of four ranks whose frozen weights lie in files of an earlier one; `told` adds to what it says."""
    files: dict[str, dict[str, Rows]] = {}
    for rank in range(RANKS):
        files[shard_name("weights", rank, RANKS)] = {"matrix": share(rank, MATRIX)}
        files[f"{KEPT}{key('earlier')}/{shard_name('weights', rank, RANKS)}"] = {"frozen": share(rank, FROZEN)}
    files[shard_name("weights-shared", 0, RANKS)] = {"count": Rows.whole(COUNT)}
    blobs, layouts = [], {}
    for number, (name, pieces) in enumerate(files.items()):
        path = folder / f"{number}.safetensors"
        write_pieces({tensor: piece for tensor, piece in pieces.items() if len(piece.tensor.reshape(-1))}, path)
        layouts[name] = layout_of(path)
        blob = store.artifacts.write_blob("a", path.name, path)
        blobs.append(Blob(name, blob.path, blob.size, blob.sha256))
    blobs.append(store.artifacts.write_blob("a", FILES, layouts_to_json(layouts | (told or {})).encode()))
    return store.artifacts.commit(Manifest(STATE, "train", {}, blobs=tuple(blobs)))


def opened(store: Store, rank: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Return the state's weights as a rank on a node of its own reads them."""
    monkeypatch.setenv("MOEGRID_CACHE", str(cache))
    job = make_job(store, [init_work()], f"a-{rank}-{cache.name}", rank=0, world_size=RANKS)
    lease = job.reporter.drop(init_work().key())
    assert lease is not None
    store.claims.release(lease)
    return fetch_shards(StageContext(job, init_work().key()), STATE, "weights", some=True)


def cached(cache: Path) -> dict[str, int]:
    """Return sha256 -> size of what a node has in its cache, by reading it."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in cache.glob("blobs/*/*")}


def test_each_rank_fetches_the_files_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(f"memory://{tmp_path.name}")
    manifest = state_in(store, tmp_path)
    for rank in range(RANKS):
        cache = tmp_path / f"node{rank}"
        weights = opened(store, rank, cache, monkeypatch)
        assert set(weights) == {"matrix", "frozen", "count"}
        assert "matrix" in weights
        assert "other" not in weights
        assert set(cached(cache)) == {manifest.blob(FILES).sha256}, "what is there is known without a file"
        for name, tensor in (("matrix", MATRIX), ("frozen", FROZEN)):
            rows = share(rank, tensor)
            count = rows.tensor.numel()
            first = rows.first * tensor.shape[1]
            read = weights.elements(name, first, count)
            assert torch.equal(read, tensor.reshape(-1)[first : first + count])
            assert read.dtype == tensor.dtype
        assert torch.equal(weights["count"], COUNT)
        file = shard_name("weights", rank, RANKS)
        own = [manifest.blob(name) for name in (file, f"{KEPT}{key('earlier')}/{file}")]
        # Of ten rows in threes the last rank has one.
        small = [manifest.blob(name) for name in (FILES, shard_name("weights-shared", 0, RANKS))]
        assert cached(cache) == {blob.sha256: blob.size for blob in (*own, *small)}


def test_a_rank_without_rows_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(f"memory://{tmp_path.name}")
    manifest = state_in(store, tmp_path)
    none = opened(store, 0, tmp_path / "node", monkeypatch).elements("matrix", 80, 0)
    assert none.shape == (0,)
    assert none.dtype == MATRIX.dtype
    assert set(cached(tmp_path / "node")) == {manifest.blob(FILES).sha256}


def test_another_number_of_ranks_fetches_what_its_rows_lie_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(f"memory://{tmp_path.name}")
    manifest = state_in(store, tmp_path)
    weights = opened(store, 0, tmp_path / "node", monkeypatch)
    assert torch.equal(weights.elements("matrix", 16, 24), MATRIX.reshape(-1)[16:40])  # rows 2 to 4: of two files
    names = [shard_name("weights", rank, RANKS) for rank in (0, 1)]
    assert set(cached(tmp_path / "node")) == {manifest.blob(name).sha256 for name in (FILES, *names)}
    assert torch.equal(weights["matrix"], MATRIX)
    assert torch.equal(weights["frozen"], FROZEN)


@pytest.mark.parametrize("name", [shard_name("weights", 1, RANKS), FILES])
def test_damage_is_noticed_before_a_byte_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = Store.open(f"memory://{tmp_path.name}")
    blob = state_in(store, tmp_path).blob(name)
    data = bytearray(store.objects.get(blob.path) or b"")
    data[-5] ^= 1
    store.objects.put(blob.path, bytes(data))
    with pytest.raises(CorruptBlob) as caught:
        opened(store, 1, tmp_path / "node", monkeypatch).elements("matrix", 24, 24)
    assert (caught.value.artifact, caught.value.path) == (STATE, blob.path)
    assert blob.sha256 not in cached(tmp_path / "node")


def test_a_file_that_holds_something_else_than_was_said_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(f"memory://{tmp_path.name}")
    name = shard_name("weights", 1, RANKS)
    state_in(store, tmp_path, told={name: {"matrix": ("float32", 2, (3, 8))}})
    with pytest.raises(MoegridError, match="does not hold what"):
        opened(store, 1, tmp_path / "node", monkeypatch).elements("matrix", 24, 8)


@pytest.mark.parametrize(
    "ranks, expected", [(4, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (8, [[0], [], [1], [], [2], [], [3], []])]
)
def test_every_file_is_read_by_one_rank_that_needs_it(ranks: int, expected: list[list[int]]) -> None:
    own = [shard_name(kind, rank, RANKS) for kind in ("weights", "optimizer") for rank in range(RANKS)]
    kept = [f"{KEPT}{key('earlier')}/{shard_name('weights', rank, RANKS)}" for rank in range(RANKS)]
    names = [*own, *kept, "state.json", FILES, f"{KEPT}{key('alone')}/{shard_name('weights', 0, 1)}"]
    shares = [share_of(names, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    for share, writers in zip(shares, expected, strict=True):
        assert [n for n in share if n in own] == [own[at] for at in (*writers, *(RANKS + w for w in writers))]
        assert [n for n in share if n in kept] == [kept[at] for at in writers]
