"""Models without memory, and what a rank reads of the shards that others wrote: rows and runs of elements."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.models import shards
from jobs.models.building import build_model, empty_model
from jobs.models.shards import Rows, Shards, rows_digest, write_pieces, write_tensors
from jobs.models.weights import canonical_state, materialise, weights_sha256
from orchestrator.spec.model import ModelSpec
from tests.training import MODEL

TIED = dataclasses.replace(MODEL, tie_embeddings=True)
BIASED = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="aux_free"))


@pytest.mark.parametrize("spec", [MODEL, TIED, BIASED])
def test_an_empty_model_becomes_the_same_model(spec: ModelSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = build_model(spec, 64)
    state = torch.get_rng_state()
    empty = empty_model(spec, 64)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in whole.named_parameters()]
    write_tensors(canonical_state(whole), tmp_path / "weights.safetensors")
    materialise(empty, Shards([tmp_path / "weights.safetensors"]))
    assert weights_sha256(empty) == weights_sha256(whole)
    assert (empty.backbone.lm_head.weight is empty.backbone.model.embed_tokens.weight) == spec.tie_embeddings
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(empty(ids).logits, whole(ids).logits)


def test_weights_are_kept_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    whole, empty = build_model(MODEL, 64), empty_model(MODEL, 64)
    name = "backbone.model.embed_tokens.weight"
    materialise(empty, canonical_state(whole), dtype_of=lambda one: torch.bfloat16 if one == name else torch.float32)
    assert torch.equal(canonical_state(empty)[name], canonical_state(whole)[name].bfloat16())
    assert {tensor.dtype for tensor in empty.parameters()} == {torch.bfloat16, torch.float32}


@pytest.fixture
def whole() -> Tensor:
    return torch.arange(7 * 2 * 3, dtype=torch.float32).view(7, 2, 3)


def written(folder: Path, pieces: list[Tensor]) -> Shards:
    for number, piece in enumerate(pieces):
        write_tensors({"x": piece, "count": torch.tensor(3.0)} if not number else {"x": piece}, folder / f"{number}")
    return Shards(folder / f"{number}" for number in range(len(pieces)))


def test_rows_are_put_together_as_their_files_say(tmp_path: Path, whole: Tensor) -> None:
    places = {"a": (4, 7), "b": (0, 1), "c": (1, 4)}
    for file, (first, end) in places.items():
        write_pieces({"x": Rows(whole[first:end], first, tuple(whole.shape))}, tmp_path / file)
    read = Shards(tmp_path / file for file in places)
    assert torch.equal(read["x"], whole)
    assert torch.equal(read.elements("x", 4, 24), whole.flatten()[4:28])


@pytest.mark.parametrize("cuts", [[7], [3, 4], [2, 2, 3]])
@pytest.mark.parametrize("flat", [False, True])
def test_elements_are_those_of_the_whole_whoever_wrote_it(
    whole: Tensor, cuts: list[int], flat: bool, tmp_path: Path
) -> None:
    pieces = list(whole.split(cuts))
    if flat:
        pieces = [piece.reshape(-1) for piece in pieces]
    found = written(tmp_path, pieces)
    for start, count in [(0, 42), (0, 6), (5, 2), (11, 20), (17, 25), (41, 1), (9, 0)]:
        expected = torch.arange(start, start + count, dtype=torch.float32)
        assert torch.equal(found.elements("x", start, count), expected)
        assert torch.equal(shards.elements({"x": whole}, "x", start, count), expected)
    assert float(found.elements("count", 0, 1)) == 3.0


def test_no_more_than_the_rows_that_are_needed_is_read(
    whole: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(tmp_path, list(whole.split([3, 4])))
    asked: list[object] = []

    class Spy:
        def __init__(self, file: object) -> None:
            self.file = file

        def get_slice(self, name: str) -> object:
            piece = self.file.get_slice(name)  # type: ignore[attr-defined]

            class Slice:
                get_shape = staticmethod(piece.get_shape)

                def __getitem__(self, rows: slice) -> Tensor:
                    asked.append((rows.start, rows.stop))
                    part: Tensor = piece[rows]
                    return part

            return Slice()

    for file in found._owners["x"]:
        file._file = Spy(file._file)  # type: ignore[assignment]
    assert "x" in found
    assert "y" not in found
    found.elements("x", 14, 6)  # of the rows 2 and 3
    assert asked == [(2, 3), (0, 1)]


def test_rows_are_digested_as_they_are_written() -> None:
    tensor = torch.randn(5, 3)
    as_bf16 = rows_digest({"x": Rows.whole(tensor.bfloat16())})
    assert rows_digest({"x": Rows(tensor, 0, (5, 3), torch.bfloat16)}) == as_bf16
    halves = [Rows(tensor[:2], 0, (5, 3), torch.bfloat16), Rows(tensor[2:], 2, (5, 3), torch.bfloat16)]
    assert sum(rows_digest({"x": half}) for half in halves) % (1 << 256) == as_bf16
