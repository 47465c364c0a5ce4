"""ONNX files as torch's exporter writes them, as far as weights go, written without its package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """Return one field of a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, value: Tensor) -> bytes:
    dims = b"".join(field(1, size) for size in value.shape)
    return dims + field(2, 1) + field(8, name) + field(9, value.detach().float().contiguous().numpy().tobytes())


def _node(kind: str, inputs: Iterable[str], output: str) -> bytes:
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)


def _model(nodes: Iterable[bytes], tensors: Mapping[str, Tensor]) -> bytes:
    graph = b"".join(field(1, node) for node in nodes)
    graph += b"".join(field(5, _tensor(name, tensor)) for name, tensor in tensors.items())
    return field(1, 8) + field(7, graph)


def graph_of(weights: Mapping[str, Tensor], prefix: str = "backbone.") -> bytes:
    """Return a file with the weights of a DINOv2 model: matrices nameless and transposed, positions in two pieces."""
    tensors: dict[str, Tensor] = {}
    nodes = []
    for name, value in weights.items():
        full = prefix + name
        if name.endswith("mask_token"):
            continue
        if name.endswith("position_embeddings"):
            tensors |= {"onnx::Concat_1": value[:, :1], "onnx::Reshape_2": value[:, 1:]}
            nodes += [_node("Reshape", ["onnx::Reshape_2", "size"], "p"), _node("Concat", ["onnx::Concat_1", "p"], "q")]
        elif value.dim() == 2:
            number, bias = len(tensors), full.removesuffix("weight") + "bias"
            tensors[f"onnx::MatMul_{number}"] = value.t()
            nodes.append(_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], f"y{number}"))
            nodes.append(_node("Add", [bias, f"y{number}"], f"z{number}"))
        else:
            tensors[full] = value
    return _model(nodes, tensors)
