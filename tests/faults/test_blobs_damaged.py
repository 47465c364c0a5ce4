"""Blobs are truncated, altered or deleted behind the store's back: they are made again, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound, graph


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def flip_unnoticed(path: Path) -> None:
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def delete(path: Path) -> None:
    path.unlink()


def blob_of(lab: Lab, key: str) -> Path:
    """Return the file of the artifact's first blob."""
    store = lab.store()
    manifest = store.artifacts.get(key)
    assert manifest is not None
    path = store.objects.local_path(manifest.blobs[0].path)
    assert path is not None
    return path


def final_state() -> str:
    """Return the key of a cell's final state."""
    return next(iter(graph().cells.values())).final


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_final_state_is_made_again_and_nothing_else(
    lab: Lab, reference: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    assert lab.drive()[0] == 0
    before = len(lab.executions())
    damage(blob_of(lab, final_state()))
    code, said = lab.drive("resume")
    assert code == 0, said
    assert "repair" in said
    assert_sound(lab, reference, once=False)
    assert [line["stage"] for line in lab.executions()[before:]] == [final_state()]
    manifest = lab.store().artifacts.get(final_state())
    assert manifest is not None
    assert manifest.generation == 1


def test_a_damaged_manifest_is_named_and_its_artifact_made_again(lab: Lab, reference: dict[str, Any]) -> None:
    assert lab.drive()[0] == 0
    before = len(lab.executions())
    truncate(lab.store_path / "artifacts" / f"{final_state()}.json")
    code, said = lab.drive("resume")
    assert code == 0, said
    assert "its manifest is damaged; it is made again" in said
    assert_sound(lab, reference, once=False)
    assert [line["stage"] for line in lab.executions()[before:]] == [final_state()]


def test_damage_that_no_listing_shows_is_found_by_its_reader(lab: Lab, reference: dict[str, Any]) -> None:
    assert lab.drive()[0] == 0
    pretrain = next(key for key, stage in graph().stages.items() if stage.phase == "pretrain")
    flip_unnoticed(blob_of(lab, pretrain))
    store = lab.store()
    for key in graph().stages:
        if graph().stages[key].phase in ("finetune", "evaluate"):
            store.artifacts.discard(key)
    for path in (lab.store_path / "artifacts").glob("*.json"):
        if path.stem not in reference and path.stem != pretrain:
            store.artifacts.discard(path.stem)
    code, said = lab.drive("resume", READ_BYTES="0")
    assert code == 0, said
    assert "the damaged artifact is made again" in said
    assert_sound(lab, reference, once=False)


@pytest.mark.parametrize(
    "phase",
    ["pretrain", *(pytest.param(phase, marks=pytest.mark.faults) for phase in ("evaluate", "finetune", "prepare"))],
)
def test_a_flipped_byte_is_found_and_made_again_whatever_needs_it(
    lab: Lab, reference: dict[str, Any], phase: str
) -> None:
    assert lab.drive()[0] == 0
    # Of each phase the first stage: a state that is only intermediate, of which everything else was made.
    damaged = next(key for key, stage in graph().stages.items() if stage.phase == phase)
    before = len(lab.executions())
    flip_unnoticed(blob_of(lab, damaged))
    code, said = lab.drive("resume")
    assert code == 0, said
    assert "repair" in said
    assert [line["stage"] for line in lab.executions()[before:]] == [damaged]
    assert_sound(lab, reference, once=False)
    assert "nothing to do" in lab.drive("resume")[1]


def test_a_large_store_is_read_whole_with_verify(lab: Lab, reference: dict[str, Any]) -> None:
    assert lab.drive()[0] == 0
    flip_unnoticed(blob_of(lab, final_state()))
    assert "nothing to do" in lab.drive("resume", READ_BYTES="0")[1]
    code, said = lab.drive("resume", "--verify", READ_BYTES="0")
    assert code == 0, said
    assert "repair" in said
    assert_sound(lab, reference, once=False)


@pytest.mark.faults
@pytest.mark.parametrize("damage", [truncate, flip, flip_unnoticed, delete])
@pytest.mark.parametrize("index", range(17))
def test_any_damaged_artifact_is_made_again(
    lab: Lab, reference: dict[str, Any], index: int, damage: Callable[[Path], None]
) -> None:
    assert lab.drive()[0] == 0
    damage(blob_of(lab, sorted(reference)[index]))
    assert lab.drive("resume")[0] == 0
    assert_sound(lab, reference, once=False)
