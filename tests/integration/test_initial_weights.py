"""The weights that a model starts from, made one module at a time: the same bits as in a model that is held whole."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.models.building import build_model, empty_model
from jobs.models.sources import open_checkpoint
from jobs.models.upcycle import initial_model, initial_weights
from jobs.models.weights import canonical_state, weights_sha256
from orchestrator.catalog.routers import ROUTERS
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.public_config import spec_of
from tests.public_models import VOCAB, llama_in, olmoe_in

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
AROUND: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"backbone": "llama", "attention_bias": "all", "head_dim": 12},
    {"backbone": "deepseek_moe", "dense_layers": 1, "dense_width": 40, "tie_embeddings": True},
]


@pytest.mark.parametrize("preset", [*ROUTERS.builtins])
def test_weights_drawn_module_by_module_are_those_of_the_whole_model(preset: str) -> None:
    for around in AROUND:
        if preset == "dense" and "dense_layers" in around:
            continue
        lists: dict[str, Any] = {"collaboration_top": 3} if preset == "c2r" else {}
        moe = MoESpec(preset=preset, num_experts=6, top_k=1 if preset == "dense" else 2, expert_width=12, **lists)
        spec = ModelSpec(**SHAPE, **around, moe=moe)
        torch.manual_seed(3)
        whole = canonical_state(build_model(spec, VOCAB))
        torch.manual_seed(3)
        model, weights = initial_weights(spec, VOCAB)
        found = {name: tensor.clone() for name, tensor in weights}
        assert found.keys() == whole.keys()
        assert [name for name, tensor in whole.items() if not torch.equal(found[name], tensor)] == []
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "how, moe, around, digest",
    # As they were when the whole model was held.
    [
        ("copy", {"preset": "smoe", "expert_width": 48}, {}, "53c66be3acc92f2ac7c8992365fda9f6"),
        (
            "partial",
            {"preset": "smoe", "expert_width": 24},
            {"dense_layers": 1, "dense_width": 48},
            "dea86215752a4afbbbcb096bdbc02c5c",
        ),
        (
            "shared_only",
            {"preset": "sharede_v2", "expert_width": 48, "shared_experts": 1},
            {},
            "3fc680784647f3d5a3759464d11dbb94",
        ),
    ],
)
def test_upcycled_weights_keep_their_bits(
    tmp_path: Path, how: str, moe: dict[str, Any], around: dict[str, Any], digest: str
) -> None:
    llama_in(tmp_path)
    dense = spec_of(open_checkpoint(tmp_path).config)
    moe_spec = MoESpec(num_experts=4, top_k=2, **moe)
    spec = dataclasses.replace(dense, checkpoint=str(tmp_path), upcycle=how, moe=moe_spec, **around)
    state = torch.random.get_rng_state()
    assert weights_sha256(initial_model(spec, VOCAB, seed=3)).startswith(digest)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "of_moe, digest",
    [
        ({"preset": "olmoe"}, "5877fa6a043cf3fe966ae6cbcad62c73"),
        ({"preset": "c2r", "collaboration_top": 3}, "78d39a502e479bbe86081842cca08f0d"),
    ],
)
def test_imported_weights_keep_their_bits(tmp_path: Path, of_moe: dict[str, Any], digest: str) -> None:
    olmoe_in(tmp_path)
    theirs = spec_of(open_checkpoint(tmp_path).config)
    spec = dataclasses.replace(theirs, checkpoint=str(tmp_path), moe=dataclasses.replace(theirs.moe, **of_moe))
    assert weights_sha256(initial_model(spec, VOCAB)).startswith(digest)


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from jobs.models.tensor_file import TensorFile
from jobs.models.upcycle import initial_weights
from jobs.models.weights import canonical_state
from orchestrator.spec.model import ModelSpec, MoESpec
def peak(layers, path):
    spec = ModelSpec(hidden_size=256, num_layers=layers, moe=MoESpec(num_experts=16, expert_width=512))
    model, weights = initial_weights(spec, 256)
    with TensorFile(path, canonical_state(model)) as file:
        for name, tensor in weights:
            file.put(name, tensor)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(2, Path(sys.argv[1]) / "few")
print(few, peak(12, Path(sys.argv[1]) / "many"))
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    few, many = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    layer = (tmp_path / "many").stat().st_size / 12
    assert (many - few) * 1024 < layer  # ten layers more, 25 MB each


def test_an_empty_model_is_left_empty() -> None:
    model = empty_model(ModelSpec(**SHAPE), VOCAB)
    assert all(parameter.is_meta for parameter in model.parameters())
