"""A run that was cut, resumed, forked or chained has the same bits as one that never stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.node.preemption import Preempted
from jobs.train.checkpoint import CheckpointWriter
from jobs.train.loop import StepResult, Trainer
from orchestrator.errors import CorruptBlob, NumericsError
from orchestrator.spec.cell import BalanceSpec, Resources, TrainSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.work import TrainWork
from orchestrator.store import Store
from tests.training import (
    EXECUTION,
    MODEL,
    TRAIN,
    init_work,
    prepare,
    run_chain,
    segments,
    state_bits,
    tensors,
    weights,
)

AUX_FREE = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="aux_free"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def fresh(path: Path, name: str, model: ModelSpec = MODEL) -> Store:
    store = prepare(str(path / name))
    run_chain(store, [init_work(model)], "init")
    return store


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the next training stage receive a stop signal while it takes its `steps`-th step."""
    original = Trainer.train_step
    taken = 0

    def counted(self: Trainer, requests: tuple[bool, ...], **options: bool) -> StepResult:
        nonlocal taken
        taken += 1
        stop = taken == steps
        result = original(self, (requests[0] or stop, *requests[1:]), **options)
        return result

    monkeypatch.setattr(Trainer, "train_step", counted)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed", "fp16"])
def test_resumed_at_any_step_equals_straight(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = dataclasses.replace(TRAIN, precision=precision, steps=10)
    (work,) = segments([("", 0, 10)], train, model=AUX_FREE)
    straight = fresh(tmp_path, "straight", AUX_FREE)
    run_chain(straight, [work])
    cut = fresh(tmp_path, "cut", AUX_FREE)
    for attempt, steps in enumerate((1, 4, 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Preempted):
                run_chain(cut, [work], f"a-{attempt}")
    run_chain(cut, [work], "a-9")
    assert state_bits(cut, work.key()) == state_bits(straight, work.key())
    whole, parts = (
        [{k: v for k, v in row.items() if k.startswith("train/") and "second" not in k} for row in rows]
        for rows in (series(straight, work), series(cut, work))
    )
    assert whole == parts


def series(store: Store, work: TrainWork) -> list[dict[str, float]]:
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    rows = json.loads(store.artifacts.read(manifest.blob("series.json")))
    assert len({row["step"] for row in rows}) == len(rows)
    return list(rows)


def test_what_is_measured_at_one_step_is_no_mean_over_the_window(tmp_path: Path) -> None:
    (work,) = segments([("router", 0, 8)], dataclasses.replace(TRAIN, steps=8))
    measured = []
    for log_every in (1, 4):
        store = fresh(tmp_path, f"every-{log_every}")
        run_chain(store, [work], execution=dataclasses.replace(EXECUTION, log_every=log_every))
        measured.append({row["step"]: row["train/router_passed_grad_norm"] for row in series(store, work)})
    assert set(measured[1]) == {1, 4, 8}
    assert {step: measured[0][step] for step in measured[1]} == measured[1]


def test_chain_separate_jobs_and_extra_cuts_agree(tmp_path: Path) -> None:
    whole = segments([("", 0, 8), ("router", 8, 16)])
    cut = segments([("", 0, 4), ("", 4, 8), ("router", 8, 12), ("router", 12, 16)])
    assert whole[-1].key() == cut[-1].key()
    chained, separate = fresh(tmp_path, "chained"), fresh(tmp_path, "separate")
    run_chain(chained, whole)
    for index, work in enumerate(cut):
        run_chain(separate, [work], f"a-{index}")
    assert state_bits(chained, whole[0].key()) == state_bits(separate, cut[1].key())
    assert state_bits(chained, whole[1].key()) == state_bits(separate, cut[3].key())


def test_forked_prefix_equals_unforked_run(tmp_path: Path) -> None:
    shared, alone = fresh(tmp_path, "shared"), fresh(tmp_path, "alone")
    forks = [segments([("", 0, 8), (frozen, 8, 16)]) for frozen in ("router", "expert")]
    run_chain(shared, [forks[0][0]], "prefix")
    for index, fork in enumerate(forks):
        run_chain(shared, [fork[1]], f"fork-{index}")
    run_chain(alone, forks[1])
    assert state_bits(shared, forks[1][1].key()) == state_bits(alone, forks[1][1].key())
    assert weights(shared, forks[0][1].key()) != weights(shared, forks[1][1].key())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_phases_chained_and_apart_agree(tmp_path: Path, precision: str) -> None:
    pretrain = segments([("", 0, 4)], dataclasses.replace(TRAIN, steps=4))
    tuned = dataclasses.replace(
        TRAIN, data=dataclasses.replace(TRAIN.data, format="instruction"), loss="response", precision=precision
    )
    finetune = segments(
        [("expert", 0, 8), ("", 8, 16)], tuned, phase="finetune", tokens="instructions", after=pretrain[0]
    )
    chained, separate = fresh(tmp_path, "chained"), fresh(tmp_path, "separate")
    run_chain(chained, [*pretrain, *finetune])
    for index, work in enumerate([*pretrain, *finetune]):
        run_chain(separate, [work], f"a-{index}")
    assert state_bits(chained, finetune[-1].key()) == state_bits(separate, finetune[-1].key())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize(("frozen", "roles"), [("router", {"router"}), ("expert", {"routed_expert", "shared_expert"})])
def test_frozen_roles_keep_every_bit_and_their_moments(
    tmp_path: Path, precision: str, frozen: str, roles: set[str]
) -> None:
    moe = MoESpec(preset="aux_free", top_k=1, num_experts=4, expert_width=32, shared_experts=1, renormalise=False)
    model = dataclasses.replace(MODEL, moe=moe)
    train = dataclasses.replace(TRAIN, precision=precision, steps=12, weight_decay=0.1)
    works = segments([("", 0, 4), (frozen, 4, 8), ("", 8, 12)], train, model=model)
    store = fresh(tmp_path, "store", model)
    run_chain(store, works)
    before, after, trained = (tensors(store, work.key(), "weights") for work in works)
    moments_before, moments_after, moments_trained = (tensors(store, work.key(), "optimizer") for work in works)
    named = {name: role for name, _, role in parameter_roles(build_model(model, 64))}
    kept = [name for name, role in named.items() if role in roles]
    assert kept
    for name in before:
        in_role = name in kept or (frozen == "router" and ".router." in name)
        assert torch.equal(before[name], after[name]) == in_role, name
        assert name not in kept or not torch.equal(after[name], trained[name]), name
    for name in kept:
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(moments_before[f"{name}.{slot}"], moments_after[f"{name}.{slot}"])
        assert moments_trained[f"{name}.step"] == 8  # it goes on from its own count
    assert moments_trained["backbone.model.norm.weight.step"] == 12


def test_periodic_states_are_artifacts_and_a_damaged_one_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is left out, however slowly the ones before it are written.
    monkeypatch.setattr(CheckpointWriter, "busy", property(lambda self: False))
    (work,) = segments([("", 0, 16)])
    straight = fresh(tmp_path, "straight")
    run_chain(straight, [work])
    store = fresh(tmp_path, "store")
    every = dataclasses.replace(EXECUTION, checkpoint_steps=4)
    run_chain(store, [work], "first", execution=every)
    states = {step: store.artifacts.get(work.key_at(step)) for step in (4, 8, 12, 16)}
    assert all(states.values())
    # What a crash between steps 12 and 16 leaves, with the last periodic state damaged.
    store.artifacts.discard(work.key())
    last = states[12]
    assert last is not None
    path = store.objects.local_path(last.blob("weights.safetensors").path)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    run_chain(store, [work], "second", execution=every)
    assert state_bits(store, work.key()) == state_bits(straight, work.key())
    again = store.artifacts.get(work.key_at(12))
    assert again is not None
    assert again.attempt == "second"


def test_damaged_parent_is_named(tmp_path: Path) -> None:
    works = segments([("", 0, 8), ("router", 8, 16)])
    store = fresh(tmp_path, "store")
    run_chain(store, works[:1], "first")
    manifest = store.artifacts.get(works[0].key())
    assert manifest is not None
    path = store.objects.local_path(manifest.blob("optimizer.safetensors").path)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptBlob) as caught:
        run_chain(store, works[1:], "second")
    assert caught.value.artifact == works[0].key()


def test_other_numerics_are_refused_within_a_phase_only(tmp_path: Path) -> None:
    first, second = segments([("", 0, 8), ("router", 8, 16)])
    (tuned,) = segments(
        [("", 0, 16)],
        TrainSpec(data=TRAIN.data, steps=16, micro_batch=2, sequence_length=16),
        phase="finetune",
        after=first,
    )
    store = fresh(tmp_path, "store")
    run_chain(store, [first], "first")
    two = Resources(cores=2)
    with pytest.raises(NumericsError, match="threads 1 -> 2"):
        run_chain(store, [second], "second", resources=two)
    run_chain(store, [tuned], "third", resources=two)
    run_chain(store, [second], "fourth", resources=two, execution=dataclasses.replace(EXECUTION, allow_numerics=True))
    manifest = store.artifacts.get(second.key())
    assert manifest is not None
    assert manifest.info["mixed_numerics"]


@pytest.mark.parametrize("preset", ["expert_choice", "word", "sentence", "moepp", "dense"])
def test_presets_fork_to_the_same_bits(tmp_path: Path, preset: str) -> None:
    model = dataclasses.replace(MODEL, moe=MoESpec(preset=preset, top_k=2, num_experts=4, expert_width=32))
    works = segments([("", 0, 2), ("router", 2, 4)], dataclasses.replace(TRAIN, steps=4), model=model)
    chained, separate = fresh(tmp_path, "chained", model), fresh(tmp_path, "separate", model)
    run_chain(chained, works)
    for index, work in enumerate(works):
        run_chain(separate, [work], f"a-{index}")
    assert state_bits(chained, works[1].key()) == state_bits(separate, works[1].key())
    rows = series(chained, works[1])
    assert ("routing/load_balance" in rows[-1]) == (preset != "dense")


def test_global_balance_is_part_of_exactness(tmp_path: Path) -> None:
    train = dataclasses.replace(TRAIN, balance=BalanceSpec(aux_scope="global", z_coef=0.0), steps=4)
    (work,) = segments([("", 0, 4)], train)
    first, second = fresh(tmp_path, "first"), fresh(tmp_path, "second")
    run_chain(first, [work])
    run_chain(second, [work])
    assert state_bits(first, work.key()) == state_bits(second, work.key())
