"""A safetensors file written tensor by tensor, in any order: memory never holds more than one of them.

The library's own writer takes all tensors at once. The bytes are the same (its layout: wide types first, then by name),
so that a blob's digest does not depend on how it was written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# In the order of safetensors' own list of types; a file has the later ones first.
_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_TYPES)}
_ALIGNMENT = 8


class TensorFile:
    """A safetensors file at `path` of tensors on the meta device (their names, types and shapes), filled by `put`.

    Used as a context; leaving it without every tensor written raises AssertionError and leaves an unfinished file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        names = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, tuple[int, Tensor]] = {}
        offset = 0
        for name in names:
            tensor = tensors[name]
            end = offset + tensor.nbytes
            header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self._places[name] = offset, tensor
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._missing = set(names)
        self._file = path.open("w+b")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        os.truncate(self._file.fileno(), self._start + offset)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; AssertionError unless it is of the type and the shape that were announced."""
        offset, announced = self._places[name]
        if (tensor.dtype, tensor.shape) != (announced.dtype, announced.shape):
            raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as announced")
        self._file.seek(self._start + offset)
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise AssertionError(f"never written: {', '.join(sorted(self._missing)[:5])}")
