"""A file that several states name is damaged: who wrote it is made again, and the others are whole with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import Manifest
from orchestrator.store.repairs import owner_of
from tests.faults.harness import Lab, graph

SHARED = {"FAKE_SHARED": "frozen"}


def states(lab: Lab) -> dict[str, Manifest]:
    """Return the grid's training states, the one that wrote the file first."""
    trained = {key for key, stage in graph().stages.items() if stage.kind == "train"}
    found = lab.store().artifacts.many(trained)
    return dict(sorted(found.items(), key=lambda item: owner_of(frozen(item[1])) != item[0]))


def frozen(manifest: Manifest) -> Any:
    """Return the file that all states share."""
    return next(blob for blob in manifest.blobs if "frozen" in blob.name)


def damaged(lab: Lab) -> tuple[dict[str, Manifest], Path, dict[str, Any]]:
    """Run the grid, cut the file short that its states share and forget every evaluation.

    Return the states, the file, and the bits and metrics of everything.
    """
    code, said = lab.drive(**SHARED)
    assert code == 0, said
    results = lab.results()
    before = states(lab)
    assert len(before) > 2
    (path,) = {lab.store().objects.local_path(frozen(manifest).path) for manifest in before.values()}
    assert path is not None
    os.truncate(path, path.stat().st_size // 2)
    for key, stage in graph().stages.items():
        if stage.phase == "evaluate":
            lab.store().artifacts.discard(key)
    return before, path, results


def again(lab: Lab, before: int) -> list[str]:
    """Return the kinds of the stages that ran since, training states by their keys."""
    stages = graph().stages
    ran = [line["stage"] for line in lab.executions()[before:]]
    return [key for key in ran if stages[key].phase != "evaluate"]


def test_one_state_is_made_again_and_the_others_are_evaluated(lab: Lab) -> None:
    before, path, results = damaged(lab)
    whole, owner = path.stat().st_size * 2, next(iter(before))
    executed = len(lab.executions())
    code, said = lab.drive("resume", **SHARED)
    assert code == 0, said
    assert said.count("it is made again") == 1
    assert said.count("whole again with") == len(before) - 1
    assert again(lab, executed) == [owner]
    assert path.stat().st_size == whole
    after = states(lab)
    assert {key: manifest.generation for key, manifest in after.items()} == {key: int(key == owner) for key in before}
    for key in before:
        lab.store().artifacts.verify(key)
        assert frozen(after[key]).path == frozen(before[key]).path
    assert lab.results() == results
    assert not list(lab.store().objects.list("repairs"))
    assert "nothing to do" in lab.drive("resume", READ_BYTES="0", **SHARED)[1], "nothing looks altered"


def test_with_other_bytes_the_others_are_made_again_too_and_it_is_said(lab: Lab) -> None:
    before, _, results = damaged(lab)
    executed = len(lab.executions())
    code, said = lab.drive("resume", FAKE_SHARED="FROZEN")
    assert code == 0, said
    assert said.count("made again with other bytes; so is it") == len(before) - 1
    assert sorted(again(lab, executed)) == sorted(before)
    for key in before:
        lab.store().artifacts.verify(key)
    made = {key: metrics for key, (_, metrics) in lab.results().items()}
    assert made == {key: metrics for key, (_, metrics) in results.items()}


def test_whoever_finds_it_by_reading_waits_for_the_same_repair(lab: Lab) -> None:
    before, path, results = damaged(lab)
    # Of its former length and age: no listing gives it away, and nothing is read before it is needed.
    times = path.stat()
    os.truncate(path, times.st_size * 2)
    os.utime(path, (0, 0))
    executed = len(lab.executions())
    code, said = lab.drive("resume", READ_BYTES="0", **SHARED)
    assert code == 0, said
    assert "the damaged artifact is made again" in said
    assert again(lab, executed) == [next(iter(before))]
    for key in before:
        lab.store().artifacts.verify(key)
    assert lab.results() == results


@pytest.mark.faults
def test_a_collection_amid_the_repair_takes_nothing_of_it(lab: Lab) -> None:
    before, path, results = damaged(lab)
    store = lab.store()
    owner = next(iter(before))
    store.artifacts.heal(owner)
    assert store.artifacts.get(owner) is None
    assert lab.drive("gc", only=())[0] == 0
    assert path.exists()
    code, said = lab.drive("resume", **SHARED)
    assert code == 0, said
    for key in before:
        lab.store().artifacts.verify(key)
    assert lab.results() == results
