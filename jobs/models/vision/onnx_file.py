"""The weights of a graph in an ONNX file, by name, without running it or needing its package.

An exported torch graph names biases and norms as the module did, and leaves the matrix of a linear layer nameless: it
is the operand of the MatMul whose output meets the named bias in an Add, transposed. ONNX files are protocol buffers;
of these the wire format is read here (field numbers: onnx.proto3 of onnx 1.17).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import SourceError

# Field numbers of the messages that are read.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_TYPE = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 8, 9
_FLOAT = 1  # TensorProto.DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Piece = tuple[int, int | memoryview]


@dataclass(frozen=True, slots=True)
class _Initializer:
    """One stored tensor: its shape and where its values lie."""

    shape: tuple[int, ...]
    values: memoryview


class OnnxWeights:
    """The fp32 initializers of an ONNX file; `names` holds those with names of modules and the nameless matrices too.

    A linear layer's matrix is called `<module>.weight` after its bias, and has torch's shape [out, in].
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read(memoryview(self._map))
        except (IndexError, ValueError) as error:
            raise SourceError(f"{path.name} is no ONNX file", cause=str(error)) from None

    def _read(self, data: memoryview) -> None:
        self._stored: dict[str, _Initializer] = {}
        self._operands: dict[str, list[str]] = {}
        products: dict[str, str] = {}  # output of a MatMul -> its stored operand
        sums: list[list[str]] = []
        for number, graph in _fields(data):
            if number != _MODEL_GRAPH or not isinstance(graph, memoryview):
                continue
            for part, message in _fields(graph):
                if not isinstance(message, memoryview):
                    continue
                if part == _GRAPH_INITIALIZER:
                    name, tensor = _initializer(message)
                    if tensor is not None:
                        self._stored[name] = tensor
                elif part == _GRAPH_NODE:
                    inputs, outputs, kind = _node(message)
                    self._operands.setdefault(kind, []).extend(inputs)
                    if kind == "MatMul":
                        products[outputs[0]] = inputs[1]
                    elif kind == "Add":
                        sums.append(inputs)
        if not self._stored:
            raise ValueError("it has no graph with stored weights")
        self._transposed: dict[str, str] = {}
        for inputs in sums:
            matrix = next((products[one] for one in inputs if one in products), "")
            bias = next((one for one in inputs if one.endswith(".bias") and one in self._stored), "")
            if matrix in self._stored and bias:
                self._transposed[f"{bias.removesuffix('.bias')}.weight"] = matrix

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name, a linear layer's matrix as torch has it."""
        named = {name: tensor.shape for name, tensor in self._stored.items()}
        return named | {name: self._stored[one].shape[::-1] for name, one in self._transposed.items()}

    def operands(self, kind: str) -> list[str]:
        """Return the names of the stored tensors that nodes of one kind (`Concat`, ...) take, in their order."""
        return [name for name in self._operands.get(kind, ()) if name in self._stored]

    def read(self, name: str) -> Tensor:
        """Return one tensor, in memory of its own."""
        stored = self._stored[self._transposed.get(name, name)]
        count = int(np.prod(stored.shape, dtype=np.int64))
        values = np.frombuffer(stored.values, dtype="<f4", count=count).reshape(stored.shape)
        tensor = torch.from_numpy(values.copy())
        return tensor.t().contiguous() if name in self._transposed else tensor


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[Piece]:
    """Yield (field number, value) of a message: numbers as int, all else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends inside a field, at byte {at}")
        yield number, data[at : at + size]
        at += size


def _packed(value: int | memoryview) -> Iterator[int]:
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        one, at = _varint(value, at)
        yield one


def _initializer(message: memoryview) -> tuple[str, _Initializer | None]:
    """Return a tensor's name and, when it is fp32, where its values are."""
    shape: list[int] = []
    name, kind, values = "", 0, memoryview(b"")
    for number, value in _fields(message):
        if number == _TENSOR_DIMS:
            shape += _packed(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number in (_TENSOR_RAW, _TENSOR_FLOATS) and isinstance(value, memoryview):
            values = value
    if kind != _FLOAT:
        return name, None
    if len(values) != 4 * int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{name} has {len(values)} bytes for shape {shape}")
    return name, _Initializer(tuple(shape), values)


def _node(message: memoryview) -> tuple[list[str], list[str], str]:
    inputs: list[str] = []
    outputs: list[str] = []
    kind = ""
    for number, value in _fields(message):
        if not isinstance(value, memoryview):
            continue
        if number == _NODE_INPUT:
            inputs.append(bytes(value).decode())
        elif number == _NODE_OUTPUT:
            outputs.append(bytes(value).decode())
        elif number == _NODE_TYPE:
            kind = bytes(value).decode()
    return inputs, outputs, kind
