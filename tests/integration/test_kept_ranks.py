"""Several ranks agree on what of a state lies in earlier files, and make a state again that lacks its moments."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from safetensors import safe_open

from jobs.models.shards import tensors_digest, weight_names
from orchestrator.spec.cell import Resources
from orchestrator.store import Manifest, Store
from tests.training import EXECUTION, TRAIN, init_work, prepare, run_chain, segments, start, submit, tensors

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="extra deepspeed is absent")
ENGINES = [
    "torch",
    "fsdp",
    pytest.param("deepspeed:3", marks=needs_deepspeed),
    # Only in the whole harness (make faults): they share their code with the above.
    pytest.param("deepspeed:2", marks=[needs_deepspeed, pytest.mark.faults]),
    pytest.param("deepspeed:1", marks=[needs_deepspeed, pytest.mark.faults]),
]


def manifest(store: Store, key: str) -> Manifest:
    found = store.artifacts.get(key)
    assert found is not None
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks(tmp_path: Path, engine: str) -> None:
    store = prepare(str(tmp_path))
    run_chain(store, [init_work()], "init")
    half, last = segments((("", 0, 2), ("expert", 2, 4)), dataclasses.replace(TRAIN, steps=4))
    for number, work in enumerate((half, last)):
        execution, two = dataclasses.replace(EXECUTION, engine=engine), Resources(processes=2)
        command = submit(store, [work], f"a-{number}", resources=two, execution=execution, light=[half, last])
        output, _ = start(command).communicate(timeout=600)
        assert store.artifacts.get(work.key()) is not None, output
    before, after = (manifest(store, work.key()) for work in (half, last))
    assert before.resumable, "made again for what went on from it, with the same weights"
    assert before.generation == 1
    assert not after.resumable
    own, *kept = weight_names(after)
    assert len([name for name in own if "-shared-" not in name]) == 2
    for name in own:
        path = store.objects.local_path(after.blob(name).path)
        assert path is not None
        with safe_open(path, framework="pt") as file:
            assert not any(".experts." in tensor for tensor in file.keys())  # noqa: SIM118 (not a dict)
    assert [{after.blob(name).path for name in names} for names in kept] == [
        {before.blob(name).path for name in weight_names(before)[0]}
    ]
    for found in (before, after):
        assert tensors_digest(tensors(store, found.key, "weights")) == found.info["weights_sha256"]
