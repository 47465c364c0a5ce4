"""What is damaged is found by reading, made absent, and made again, also where nothing needs it any more."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.engine import audit
from orchestrator.engine.audit import heal
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.store import Manifest, Store


@pytest.fixture(scope="module")
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart", only=("freeze=none",)))


@pytest.fixture
def store(graph: StageGraph) -> Store:
    """A bucket (no listing gives a change away) in which everything is done."""
    made = Store.open(f"memory://{uuid.uuid4().hex}")
    for key, stage in graph.stages.items():
        blobs = (
            made.artifacts.write_blob("a-0-0", "weights", key.encode() * 100),
            made.artifacts.write_blob("a-0-0", "series.json", b"[]"),
        )
        parents = {parent: made.artifacts.load(parent).digest for parent in stage.parents}
        made.artifacts.commit(
            Manifest(key=key, kind=stage.kind, spec={}, blobs=blobs, parents=parents, attempt="a-0-0")
        )
    return made


def flip(store: Store, key: str, name: str = "weights") -> None:
    manifest = store.artifacts.get(key)
    assert manifest is not None
    path = manifest.blob(name).path
    data = bytearray(store.objects.get(path) or b"")
    data[0] ^= 1
    store.objects.put(path, bytes(data))


@pytest.mark.parametrize("phase", ["prepare", "pretrain", "finetune", "evaluate"])
def test_a_flipped_byte_of_any_artifact_makes_it_run_again(store: Store, graph: StageGraph, phase: str) -> None:
    key = next(key for key, stage in graph.stages.items() if stage.phase == phase)
    flip(store, key)
    found = heal(store, graph)
    assert found.wrong.keys() == {key}
    assert "sha256" in found.wrong[key]
    present = store.artifacts.keys()
    damaged = store.artifacts.damaged(set(graph.stages))
    assert damaged == {key}
    plan = make_plan(graph, present, damaged=damaged)
    assert plan.keys("run") == [key]
    assert not heal(store, graph).wrong, "it is absent now"


def test_what_was_collected_is_not_made_again(store: Store, graph: StageGraph) -> None:
    key = next(key for key, stage in graph.stages.items() if stage.phase == "pretrain")
    assert store.artifacts.discard(key)
    assert store.artifacts.damaged(set(graph.stages)) == set()
    assert make_plan(graph, store.artifacts.keys()).keys("run") == []


def test_a_manifest_that_was_cut_short_is_damage_too(store: Store, graph: StageGraph) -> None:
    keys = list(graph.stages)
    store.objects.put(f"artifacts/{keys[0]}.json", b"")
    store.objects.put(f"artifacts/{keys[1]}.json", b'{"format":1,"key":"ab')
    manifest = store.objects.get(f"artifacts/{keys[2]}.json") or b""
    store.objects.put(f"artifacts/{keys[2]}.json", manifest[:-9])
    heal(store, graph)
    assert store.artifacts.damaged(set(keys)) == set(keys[:3])


def test_results_are_read_first_and_the_rest_as_far_as_the_limit_allows(
    store: Store, graph: StageGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = next(key for key, stage in graph.stages.items() if stage.phase == "pretrain")
    result = next(key for key, stage in graph.stages.items() if stage.phase == "evaluate")
    results = [stage for stage in graph.stages.values() if stage.kind in audit.MEASURED]
    monkeypatch.setattr(audit, "READ_BYTES_REMOTE", 6400.0 * len(results) + 2.0 * len(graph.stages))
    flip(store, state)
    flip(store, result)
    assert heal(store, graph).wrong.keys() == {result}
    assert heal(store, graph, thorough=True).wrong.keys() == {state}


def test_a_server_that_answers_garbage_once_costs_no_artifact(
    store: Store, graph: StageGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answered = store.objects.chunks, set[str]()

    def once(path: str) -> object:
        if path not in answered:
            answered.add(path)
            return iter([b"<html>busy</html>"])
        return real(path)

    monkeypatch.setattr(store.objects, "chunks", once)
    assert not heal(store, graph).wrong
    assert len(answered) == 2 * len(graph.stages)
