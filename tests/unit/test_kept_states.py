"""What is kept of a state: moments only where something continues, and frozen weights once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.models.shards import tensors_digest
from jobs.node.context import StageContext
from jobs.node.opening import read_job
from jobs.node.preemption import Preempted
from jobs.train.loop import StepResult, Trainer
from orchestrator.errors import ArtifactMissing, CorruptBlob, NumericsError
from orchestrator.grid.load import load_grid
from orchestrator.plan.describe import describe_job
from orchestrator.plan.graph import build_graph
from orchestrator.plan.moments import continuations, keeps_moments
from orchestrator.spec.cell import AdapterSpec, Resources
from orchestrator.spec.work import TrainWork
from orchestrator.store import Manifest, Store
from orchestrator.store.attempts import PlannedJob
from tests.training import EXECUTION, TRAIN, init_work, prepare, run_chain, segments, state_bits, tensors, weights

HALF, LAST = segments([("", 0, 4), ("router", 4, 8)])
EVERY = dataclasses.replace(EXECUTION, checkpoint_steps=2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were taken, as they are taken."""
    taken: list[int] = []
    original = Trainer.train_step

    def counted(self: Trainer, requests: tuple[bool, ...], **options: bool) -> StepResult:
        taken.append(self.step)
        return original(self, requests, **options)

    monkeypatch.setattr(Trainer, "train_step", counted)
    return taken


def fresh(path: Path) -> Store:
    store = prepare(str(path))
    run_chain(store, [init_work()], "init")
    return store


def manifest(store: Store, work: TrainWork, step: int = 0) -> Manifest:
    found = store.artifacts.get(work.key_at(step) if step else work.key())
    assert found is not None
    return found


def names(found: Manifest) -> set[str]:
    return {blob.name for blob in found.blobs}


def test_a_state_with_and_without_moments_is_one_to_its_children(tmp_path: Path) -> None:
    whole, light = fresh(tmp_path / "whole"), fresh(tmp_path / "light")
    run_chain(whole, [HALF, LAST])
    run_chain(light, [HALF, LAST], light=[HALF, LAST])
    for work in (HALF, LAST):
        with_moments, without = manifest(whole, work), manifest(light, work)
        assert with_moments.resumable
        assert not without.resumable
        assert names(with_moments) - names(without) == {"optimizer.safetensors"}
        assert with_moments.digest == without.digest
        assert weights(whole, work.key()) == weights(light, work.key())
    assert not whole.artifacts.stale([manifest(light, LAST)])


def test_states_on_the_way_keep_their_moments(tmp_path: Path, steps: list[int]) -> None:
    store = fresh(tmp_path)
    run_chain(store, [HALF], light=[HALF], execution=EVERY)
    assert manifest(store, HALF, 2).resumable
    assert not manifest(store, HALF).resumable
    store.artifacts.discard(HALF.key())
    run_chain(store, [HALF], "again", light=[HALF], execution=EVERY)
    assert steps == [0, 1, 2, 3, 2, 3]


def test_what_goes_on_from_a_state_without_moments_makes_it_again(tmp_path: Path, steps: list[int]) -> None:
    straight, store = fresh(tmp_path / "straight"), fresh(tmp_path / "store")
    run_chain(straight, [HALF, LAST])
    run_chain(store, [HALF], light=[HALF])
    before = manifest(store, HALF)
    steps.clear()
    run_chain(store, [LAST], "b")
    assert steps == list(range(8))
    assert state_bits(store, LAST.key()) == state_bits(straight, LAST.key())
    after = manifest(store, HALF)
    assert after.resumable
    assert after.generation == before.generation + 1
    assert set(before.blobs) < set(after.blobs), "its weights stay where they lie"
    assert state_bits(store, HALF.key()) == state_bits(straight, HALF.key())
    # The next one that goes on from it finds it whole.
    (fork,) = segments([("", 0, 4), ("expert", 4, 8)])[1:]
    steps.clear()
    run_chain(store, [fork], "c")
    assert steps == list(range(4, 8))


def test_making_it_again_begins_at_the_latest_state_that_has_moments(tmp_path: Path, steps: list[int]) -> None:
    store = fresh(tmp_path)
    run_chain(store, [HALF], light=[HALF], execution=EVERY)
    steps.clear()
    run_chain(store, [LAST], "b", light=[LAST])
    assert steps == list(range(2, 8))


def test_a_stop_while_it_is_made_again_loses_nothing(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, store = fresh(tmp_path / "straight"), fresh(tmp_path / "store")
    run_chain(straight, [HALF, LAST])
    run_chain(store, [HALF], light=[HALF])
    counted = Trainer.train_step

    def stopped(self: Trainer, requests: tuple[bool, ...], **options: bool) -> StepResult:
        return counted(self, (self.step == 1, *requests[1:]), **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(Preempted):
            run_chain(store, [LAST], "b")
    steps.clear()
    run_chain(store, [LAST], "c")
    assert steps == list(range(2, 8))
    assert state_bits(store, LAST.key()) == state_bits(straight, LAST.key())


def test_a_stop_in_a_chain_waits_until_the_moments_are_kept(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, store = fresh(tmp_path / "straight"), fresh(tmp_path / "store")
    run_chain(straight, [HALF, LAST])
    steps.clear()
    # The signal comes between the segments, when what is committed could not be gone on from.
    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "stopping", property(lambda self: len(steps) >= 4))
        with pytest.raises(Preempted):
            run_chain(store, [HALF, LAST], light=[HALF, LAST])
    assert not manifest(store, HALF).resumable
    assert manifest(store, LAST, 5).resumable
    run_chain(store, [LAST], "b", light=[LAST])
    assert steps == list(range(8))
    assert weights(store, LAST.key()) == weights(straight, LAST.key())
    # One that comes in the last step of a segment is known when its state is written.
    other = fresh(tmp_path / "other")
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "stopping", property(lambda self: len(steps) == 3))
        run_chain(other, [HALF], light=[HALF])
    assert manifest(other, HALF).resumable


def test_under_other_numerics_it_is_not_made_again(tmp_path: Path, steps: list[int]) -> None:
    store = fresh(tmp_path)
    run_chain(store, [HALF], light=[HALF])
    steps.clear()
    with pytest.raises(NumericsError, match="threads 1 -> 2"):
        run_chain(store, [LAST], "b", resources=Resources(cores=2))
    assert not steps
    # Where other bits come of it in spite of equal numerics, nobody goes on from them.
    kept = manifest(store, HALF)
    other = dataclasses.replace(kept, info={**kept.info, "weights_sha256": "0" * 64}, attempt="other")
    store.artifacts.discard(HALF.key())
    store.artifacts.commit(other)
    with pytest.raises(NumericsError, match="became another one"):
        run_chain(store, [LAST], "c")
    assert manifest(store, HALF).attempt == "other"


def test_where_its_own_parent_is_gone_a_plan_makes_all_of_it(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    first, second, third = segments([("", 0, 2), ("expert", 2, 4), ("router", 4, 6)])
    run_chain(store, [first, second], light=[first, second])
    store.artifacts.discard(first.key())
    with pytest.raises(ArtifactMissing):
        run_chain(store, [third], "b")
    assert store.artifacts.get(second.key()) is None


def test_a_state_without_moments_never_takes_the_place_of_one_with(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run_chain(store, [HALF])
    whole = manifest(store, HALF)
    blobs = tuple(blob for blob in whole.blobs if not blob.name.startswith("optimizer"))
    light = dataclasses.replace(whole, info={**whole.info, "moments": False}, blobs=blobs, attempt="late")
    assert store.artifacts.commit(light).attempt == whole.attempt
    assert manifest(store, HALF).resumable


def kept_from(found: Manifest) -> set[str]:
    """Return the states in whose files a state keeps weights."""
    return {name.partition("/")[0].removeprefix("kept-") for name in names(found) if name.startswith("kept-")}


def of_experts(named: Iterable[str]) -> set[str]:
    return {name for name in named if ".experts." in name}


def own_tensors(store: Store, found: Manifest) -> set[str]:
    path = store.objects.local_path(found.blob("weights.safetensors").path)
    assert path is not None
    return set(load_file(path))


def test_frozen_weights_are_written_once(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    works = segments([("expert", 0, 4), ("expert", 4, 8), ("", 8, 12), ("expert", 12, 16)])
    run_chain(store, works, execution=EVERY)
    init = init_work().key()
    first, second, trained, last = (manifest(store, work) for work in works)
    whole = set(tensors(store, init, "weights"))
    assert own_tensors(store, first) == own_tensors(store, second) == whole - of_experts(whole)
    assert kept_from(first) == kept_from(second) == kept_from(manifest(store, works[0], 2)) == {init}
    assert own_tensors(store, trained) == whole
    assert not kept_from(trained)
    assert kept_from(last) == {trained.key}
    begun = tensors(store, init, "weights")
    for found in (first, second, trained, last):
        read = tensors(store, found.key, "weights")
        assert set(read) == whole
        assert tensors_digest(read) == found.info["weights_sha256"]
        same = {name for name, value in read.items() if torch.equal(value, begun[name])}
        assert same == (of_experts(whole) if found in (first, second) else set())
    # A file that two states name is one file.
    assert {blob.path for blob in last.blobs} & {blob.path for blob in trained.blobs}


def test_what_is_kept_is_read_from_the_state_that_has_it(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    works = segments([("", 0, 4), ("expert", 4, 8), ("expert+embedding", 8, 12)])
    run_chain(store, works)
    first, second, third = (manifest(store, work) for work in works)
    assert kept_from(third) == {first.key, second.key}
    before, after = (tensors(store, found.key, "weights") for found in (second, third))
    embeddings = {name for name in after if "embed" in name or "lm_head" in name}
    assert embeddings
    for name in after:
        assert torch.equal(before[name], after[name]) == (name in embeddings | of_experts(after)), name
    assert tensors_digest(after) == third.info["weights_sha256"]
    # One process that goes on from it has what a chain that never stopped has.
    straight = fresh(tmp_path / "straight")
    run_chain(straight, works[:2])
    run_chain(straight, works[2:], "b")
    assert state_bits(straight, third.key) == state_bits(store, third.key)


def test_files_of_which_little_is_unchanged_are_not_kept(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    run_chain(store, [HALF, LAST])
    assert not kept_from(manifest(store, LAST)), "a router is not worth reading a whole state for"


def test_adapters_leave_the_model_where_it_lies(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    adapter = AdapterSpec(rank=2, targets="attention")
    (work,) = segments([("", 0, 4)], dataclasses.replace(TRAIN, steps=4, adapter=adapter))
    run_chain(store, [work], light=[work])
    found = manifest(store, work)
    assert kept_from(found) == {init_work().key()}
    assert all("_lora_" in name for name in own_tensors(store, found))
    assert tensors_digest(tensors(store, found.key, "weights")) == found.info["weights_sha256"]


def test_a_damaged_file_is_damage_of_every_state_that_names_it(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    works = segments([("expert", 0, 4), ("expert", 4, 8)])
    run_chain(store, works)
    init = store.artifacts.get(init_work().key())
    assert init is not None
    path = store.objects.local_path(init.blob("weights.safetensors").path)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptBlob):
        store.artifacts.verify(works[1].key())
    for key in (works[1].key(), works[0].key(), init.key):
        assert store.artifacts.heal(key)
    run_chain(store, [init_work()], "again")
    run_chain(store, works, "b")
    store.artifacts.verify(works[1].key())


def moments_of(name: str, scale: str) -> dict[tuple[str, ...], bool]:
    """Return of every training state that is no last one, by the freeze words of what goes on from it: is it whole?"""
    graph = build_graph(load_grid(name, scale=scale))
    found = {}
    for key, stage in graph.stages.items():
        following = [graph.stages[child].made for child in continuations(graph, key)]
        words = tuple(sorted(w.conditions.train.freeze for w in following if isinstance(w, TrainWork)))
        if words:
            found[stage.label.rpartition(" seed")[0], *words] = keeps_moments(graph, key)
    return found


def test_a_large_optimizer_state_is_not_kept_for_what_the_same_job_goes_on_to() -> None:
    assert set(moments_of("finetune_freeze", "tiny").values()) == {True}
    paper = moments_of("finetune_freeze", "paper")
    # Three schedules go on from each of these; a learning rate of the router's own has one.
    assert {len(words) > 2 for words, whole in paper.items() if whole} == {True}
    assert {len(words) > 2 for words, whole in paper.items() if not whole} == {False}
    graph = build_graph(load_grid("finetune_freeze", scale="paper"))
    half = next(key for key in graph.stages if len(continuations(graph, key)) == 1)
    (child,) = continuations(graph, half)
    assert not keeps_moments(graph, half, [half, child])
    assert keeps_moments(graph, half, [half]), "the other stage is another job's"
    never = {"execution.checkpoint_seconds": 0}
    graph = build_graph(
        load_grid("finetune_freeze", scale="paper", overrides=[f"set.{k}={v}" for k, v in never.items()])
    )
    assert keeps_moments(graph, half), "there would be nothing to go back to"


def test_jobs_are_told_from_which_states_nothing_goes_on() -> None:
    graph = build_graph(load_grid("finetune_freeze", scale="tiny"))
    states = [key for key, stage in graph.stages.items() if stage.kind == "train"]
    job = read_job(PlannedJob.parse(describe_job(graph, "b-0", states, Resources(), {}).to_json()))
    ends = {stage.key for stage in job.stages if not stage.moments}
    works = [stage.work for stage in job.stages if isinstance(stage.work, TrainWork)]
    # A phase is planned to its last step, from which no other one can go on.
    assert ends == {work.key() for work in works if work.stop == work.conditions.train.steps}
    assert 0 < len(ends) < len(states)
