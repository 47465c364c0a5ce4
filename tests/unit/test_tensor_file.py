"""A file written tensor by tensor has the bytes of safetensors' own writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.models.tensor_file import TensorFile

TYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    torch.manual_seed(0)
    tensors = {f"é.{i}.{dtype}": (torch.randn(3, 1 + i) * 9).to(dtype) for i, dtype in enumerate(TYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "b": torch.ones(2), "a": torch.zeros(5, 3).t()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata=metadata)
    with TensorFile(tmp_path / "ours", {name: tensor.to("meta") for name, tensor in tensors.items()}, metadata) as file:
        for name in reversed(tensors):
            file.put(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())


def test_a_forgotten_or_a_different_tensor_is_no_file(tmp_path: Path) -> None:
    announced = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
    with pytest.raises(AssertionError, match="never written: b"), TensorFile(tmp_path / "half", announced) as file:
        file.put("a", torch.ones(2))
    with pytest.raises(AssertionError, match="not as announced"), TensorFile(tmp_path / "other", announced) as file:
        file.put("a", torch.ones(3))
