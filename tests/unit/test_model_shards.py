"""Shards: whoever holds which rows, they read back as the whole and their digests add up to its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.models.shards import (
    Rows,
    Shards,
    dealt,
    digest_text,
    rows_digest,
    shard_name,
    shard_names,
    tensors_digest,
    write_tensors,
)
from orchestrator.errors import MoegridError
from orchestrator.store import Blob, Manifest

TENSORS = {
    "matrix": torch.arange(20.0).view(5, 4),
    "half": torch.arange(6, dtype=torch.bfloat16).view(3, 2),
    "experts": torch.arange(24.0).view(2, 3, 4),
    "vector": torch.arange(3.0),
    "count": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
}


def cut(rank: int, ranks: int) -> dict[str, Rows]:
    pieces: dict[str, Rows] = {}
    for name, tensor in TENSORS.items():
        if tensor.dim() == 0:
            pieces |= {name: Rows.whole(tensor)} if rank == 0 else {}
            continue
        height = -(-len(tensor) // ranks)
        rows = tensor[rank * height : (rank + 1) * height]
        if len(rows) or (rank == 0 and not len(tensor)):
            pieces[name] = Rows(rows, rank * height, tuple(tensor.shape))
    return pieces


def manifest(names: list[str]) -> Manifest:
    blobs = tuple(Blob(name, f"blobs/{name}", 0, "") for name in names)
    return Manifest(key="k" * 64, kind="train", spec={}, blobs=blobs)


def test_a_state_without_weights_is_named() -> None:
    with pytest.raises(MoegridError, match=r"has no blob 'weights\.safetensors'"):
        shard_names(manifest(["state.json"]), "weights")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_of_all_ranks_are_the_whole(tmp_path: Path, ranks: int) -> None:
    shares = [cut(rank, ranks) for rank in range(ranks)]
    names = [shard_name("weights", rank, ranks) for rank in range(ranks)]
    for name, share in zip(names, shares, strict=True):
        save_file({key: piece.tensor.contiguous() for key, piece in share.items()}, tmp_path / name)
    assert digest_text(rows_digest(share) for share in reversed(shares)) == tensors_digest(TENSORS)
    others = ["state.json", "optimizer.safetensors", "weights_of_something"]
    read = Shards(tmp_path / name for name in shard_names(manifest([*reversed(names), *others]), "weights"))
    assert len(read) == len(TENSORS) == len(set(read))
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "other",
    [
        TENSORS | {"matrix": TENSORS["matrix"].flip(0)},
        TENSORS | {"matrix": TENSORS["matrix"].view(4, 5)},
        TENSORS | {"vector": torch.tensor([0.0, 1.0, 2.0000002])},
        TENSORS | {"vector": TENSORS["vector"].view(torch.int32)},
        {name: tensor for name, tensor in TENSORS.items() if name != "count"},
        {{"experts": "other"}.get(name, name): tensor for name, tensor in TENSORS.items()},
    ],
    ids=["rows exchanged", "shape", "one bit", "dtype", "one less", "name"],
)
def test_the_digest_tells_other_tensors_apart(other: dict[str, Tensor]) -> None:
    assert tensors_digest(other) != tensors_digest(TENSORS)
    assert tensors_digest(dict(reversed(TENSORS.items()))) == tensors_digest(TENSORS)


def test_what_every_rank_holds_is_dealt_by_bytes() -> None:
    tensors = {f"{name}{layer}": torch.empty(size) for layer in range(8) for name, size in {"a": 900, "b": 30}.items()}
    shares = [dealt(tensors, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensor.nbytes for tensor in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 120


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(TENSORS, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_written_is_contiguous_and_the_same(tmp_path: Path) -> None:
    turned = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in TENSORS.items()}
    turned["every other"] = torch.arange(10.0)[::2]
    write_tensors(turned, tmp_path / "model.safetensors")
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == turned.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in turned.items())
