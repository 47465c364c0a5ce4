"""Retention: only what nothing can need is deleted, in two steps, and a race with a plan or a commit loses nothing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import Manifest, Store
from orchestrator.store.artifacts import DYING
from orchestrator.store.attempts import PlannedJob, PlannedStage, Submission
from orchestrator.store.retention import collect, grid_roots, plan_gc

INIT, HALF, FULL, OTHER = (letter * 64 for letter in "abcd")


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def make(store: Store, key: str, parent: str = "", kind: str = "train", attempt: str = "") -> Manifest:
    attempt = attempt or f"batch{key[0]}-0"
    blob = store.artifacts.write_blob(attempt, "weights", key.encode())
    parents = {parent: "digest"} if parent else {}
    return store.artifacts.commit(
        Manifest(key=key, kind=kind, spec={}, blobs=(blob,), attempt=attempt, parents=parents)
    )


def gc(store: Store, grace: float = 0.0, **options: Any) -> Any:
    return collect(store, plan_gc(store, grid_roots(store), grace), **options)


def blobs(store: Store) -> set[str]:
    return {(store.objects.get(entry.path) or b"").decode() for entry in store.objects.list("blobs")}


def test_a_grid_keeps_its_artifacts_and_their_parents(store: Store) -> None:
    make(store, INIT, kind="init")
    make(store, HALF, INIT)
    make(store, FULL, HALF)
    make(store, OTHER)
    store.write_root("grid", "v1", {"keys": [FULL]})
    plan = plan_gc(store, grid_roots(store), 0)
    assert plan.keep == {INIT, HALF, FULL}
    assert plan.delete == (OTHER,)
    assert store.artifacts.keys() == {INIT, HALF, FULL, OTHER}, "planning changes nothing"
    done = collect(store, plan)
    assert done.deleted == (OTHER,)
    assert done.bytes == 64
    assert store.artifacts.keys() == {INIT, HALF, FULL}
    assert store.artifacts.get(OTHER) is None
    assert blobs(store) == {INIT, HALF, FULL}
    for key in (INIT, HALF, FULL):
        store.artifacts.verify(key)


def test_an_old_version_of_a_grid_keeps_its_artifacts_too(store: Store) -> None:
    make(store, HALF)
    make(store, FULL)
    store.write_root("grid", "v1", {"keys": [HALF]})
    store.write_root("grid", "v2", {"keys": [FULL]})
    assert gc(store).deleted == ()


def test_within_the_grace_period_artifacts_are_only_marked(store: Store) -> None:
    make(store, OTHER)
    assert gc(store, grace=3600).deleted == ()
    assert store.artifacts.keys() == {OTHER}
    plan = plan_gc(store, set(), 3600)
    assert (plan.mark, plan.delete) == ((), ())


def test_after_the_grace_period_the_marked_go_unless_a_grid_wants_them_again(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    make(store, OTHER)
    make(store, FULL)
    gc(store, grace=3600)
    for mark in (tmp_path / "tombstones" / "marked").iterdir():
        os.utime(mark, (1e9, 1e9))
    store.write_root("grid", "v1", {"keys": [FULL]})
    plan = plan_gc(store, grid_roots(store), 3600)
    assert plan.delete == (OTHER,)
    assert plan.unmark == (FULL,)
    collect(store, plan)
    assert store.artifacts.keys() == {FULL}
    assert list(store.objects.list("tombstones")) == []


def test_what_a_working_attempt_made_is_kept(store: Store) -> None:
    store.claims.claim("stage", "live-0", 60)
    make(store, HALF, attempt="live-0")
    store.artifacts.write_blob("live-0", "uploading", b"in flight")
    assert gc(store).deleted == ()
    assert blobs(store) == {HALF, "in flight"}


def test_what_a_working_attempt_reads_is_kept(store: Store) -> None:
    """What it is about to commit may name files of its parents; nothing else keeps these here."""
    make(store, INIT, kind="init")
    make(store, HALF, INIT)
    make(store, OTHER)
    stage = PlannedStage(FULL, parents=(HALF,))
    jobs = (PlannedJob("live-0", "", {}, {}, (stage,)), PlannedJob("live-1", "", {}, {}, (PlannedStage(OTHER),)))
    store.put_json("submissions/live.json", Submission("live", jobs).to_json())
    lease = store.claims.claim(FULL, "live-0", 60)
    assert lease is not None
    assert gc(store).deleted == (OTHER,)
    store.claims.release(lease)
    assert set(gc(store).deleted) == {INIT, HALF}


def test_a_file_that_two_artifacts_name_goes_with_the_last(store: Store) -> None:
    first = make(store, HALF)
    own = store.artifacts.write_blob("b-0", "weights", b"own")
    kept = replace(first.blobs[0], name=f"kept-{HALF}/weights")
    store.artifacts.commit(Manifest(FULL, "train", {}, attempt="b-0", blobs=(own, kept)))
    store.write_root("grid", "v1", {"keys": [FULL]})
    plan = plan_gc(store, grid_roots(store), 0)
    assert plan.delete == (HALF,)
    assert plan.delete_bytes == 0
    done = collect(store, plan)
    assert (done.deleted, done.objects) == ((HALF,), 0)
    store.artifacts.verify(FULL)
    assert collect(store, plan_gc(store, set(), 0), set).objects == 2
    assert blobs(store) == set()


def test_states_that_an_unfinished_grid_could_resume_from_are_kept(store: Store) -> None:
    make(store, INIT, kind="init")
    make(store, HALF, INIT)  # a periodic checkpoint on the way to FULL; no grid names it
    store.write_root("grid", "v1", {"keys": [INIT, FULL]})
    assert gc(store).deleted == ()
    make(store, FULL, INIT)
    assert gc(store).deleted == (HALF,)


def test_a_grid_that_is_planned_during_the_collection_is_spared(store: Store) -> None:
    make(store, OTHER)

    def roots_after_a_plan() -> set[str]:
        store.write_root("late", "v1", {"keys": [OTHER]})
        assert store.artifacts.keys() == set(), "a plan takes the dying for absent"
        assert store.artifacts.get(OTHER) is None
        assert store.artifacts.many([OTHER]) == {}
        return grid_roots(store)

    done = gc(store, list_roots=roots_after_a_plan)
    assert done.spared == (OTHER,)
    assert store.artifacts.keys() == {OTHER}
    store.artifacts.verify(OTHER)


def test_a_commit_during_the_collection_survives_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make(store, OTHER, attempt="old-0")
    plan = plan_gc(store, grid_roots(store), 0)
    genuine = store.artifacts.load_many
    redone: list[Manifest] = []

    def read_before_someone_commits(keys: set[str]) -> dict[str, Manifest]:
        found = genuine(keys)
        if not redone:
            redone.append(make(store, OTHER, attempt="new-0"))
        return found

    monkeypatch.setattr(store.artifacts, "load_many", read_before_someone_commits)
    assert collect(store, plan).spared == (OTHER,)
    assert redone[0].generation == 1
    assert store.artifacts.keys() == {OTHER}
    store.artifacts.verify(OTHER)


@pytest.mark.parametrize("step", range(6))
def test_a_collector_that_dies_is_finished_by_the_next(tmp_path: Path, step: int) -> None:
    store = Store.open(str(tmp_path))
    make(store, OTHER)
    make(store, FULL)
    store.write_root("grid", "v1", {"keys": [FULL]})
    plan = plan_gc(store, grid_roots(store), 0)
    calls = 0

    def dies(genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise KeyboardInterrupt
            return genuine(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "replace", "delete", "create"):
            patch.setattr(store.objects, name, dies(getattr(store.objects, name)))
        try:
            collect(store, plan)
        except KeyboardInterrupt:
            assert calls == step + 1
    assert FULL in store.artifacts.keys()  # noqa: SIM118
    gc(store)
    assert store.artifacts.keys() == {FULL}
    assert blobs(store) == {FULL}
    assert list(store.objects.list("tombstones")) == []


def test_a_dead_collectors_tombstone_does_not_hide_an_artifact_for_ever(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    make(store, FULL)
    store.objects.put(f"{DYING}/{FULL}.json", b"{}")
    assert store.artifacts.keys() == set()
    os.utime(tmp_path / DYING / f"{FULL}.json", (1e9, 1e9))
    assert store.artifacts.keys() == {FULL}
    assert store.artifacts.get(FULL) is not None


def test_blobs_of_no_artifact_go_after_the_grace_period(store: Store) -> None:
    make(store, FULL)
    store.write_root("grid", "v1", {"keys": [FULL]})
    store.artifacts.write_blob("dead-0", "weights", b"half done")
    assert gc(store, grace=3600).objects == 0
    assert gc(store, grace=0).objects == 1
    assert blobs(store) == {FULL}


def test_a_collected_artifact_can_be_made_again(store: Store) -> None:
    make(store, OTHER)
    gc(store)
    again = make(store, OTHER, attempt="again-0")
    assert again.generation == 1
    store.artifacts.verify(OTHER)
