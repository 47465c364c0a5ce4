"""fp16: the loss scale and the steps that it skips are part of the state, and a run that is cut has the same ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.node.preemption import Preempted
from jobs.train import scale
from jobs.train.engines.torch import TorchEngine
from jobs.train.errors import NotFinite
from jobs.train.loop import Trainer
from jobs.train.scale import LossScale
from orchestrator.spec.work import TrainWork
from orchestrator.store import Store
from tests.training import EXECUTION, TRAIN, init_work, prepare, run_chain, segments, state_bits, tensors

HALF = dataclasses.replace(TRAIN, precision="fp16", steps=12)


@pytest.fixture(autouse=True)
def _overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with a scale under which fp16 overflows (its largest number is 65,504), and grow it again soon."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(scale, "FIRST", 2.0**24)
    monkeypatch.setattr(scale, "GROWTH_STEPS", 3)


def fresh(path: Path, name: str) -> Store:
    store = prepare(str(path / name))
    run_chain(store, [init_work()], "init")
    return store


def state(store: Store, work: TrainWork) -> dict[str, Any]:
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    return dict(json.loads(store.artifacts.read(manifest.blob("state.json"))))


def rows(store: Store, work: TrainWork) -> list[dict[str, float]]:
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    return list(json.loads(store.artifacts.read(manifest.blob("series.json"))))


def test_a_step_that_overflows_is_skipped_counted_and_changes_nothing(tmp_path: Path) -> None:
    store = fresh(tmp_path, "store")
    works = segments([("", 0, 1), ("", 1, 12)], HALF)
    run_chain(store, works, execution=dataclasses.replace(EXECUTION, log_every=1))
    assert state(store, works[0])["loss_scale"] == {"value": 2.0**23, "applied": 0, "skipped": 1}
    assert not tensors(store, works[0].key(), "optimizer"), "nothing was updated"
    before, after = (tensors(store, key, "weights") for key in (init_work().key(), works[0].key()))
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = state(store, works[1])
    assert last["step"] == 12
    # The rule, replayed from what was logged.
    value, applied, skipped = 2.0**24, 0, 0
    for row in (*rows(store, works[0]), *rows(store, works[1])):
        if row["train/skipped_steps"] > skipped:
            value, applied, skipped = value / 2, 0, skipped + 1
            assert row["train/grad_norm"] == 0.0
        else:
            applied += 1
            value, applied = (2 * value, 0) if applied == 3 else (value, applied)
            assert row["train/grad_norm"] > 0.0
        assert (row["train/loss_scale"], row["train/skipped_steps"]) == (value, skipped)
        assert row["train/lm_loss"] > 0
    assert last["loss_scale"] == {"value": value, "applied": applied, "skipped": skipped}
    assert 2 < skipped < 12


def test_cut_anywhere_it_goes_on_with_the_scale_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    (work,) = segments([("", 0, 12)], HALF)
    run_chain(straight, [work])
    original = Trainer.train_step
    for attempt, steps in enumerate((1, 2, 4)):
        with monkeypatch.context() as patch:
            taken: list[int] = []

            def counted(self: Trainer, wishes: tuple[bool, ...], taken: list[int] = taken, **options: bool) -> Any:
                taken.append(1)
                return original(self, (wishes[0] or len(taken) == steps, *wishes[1:]), **options)  # noqa: B023

            patch.setattr(Trainer, "train_step", counted)
            with pytest.raises(Preempted):
                run_chain(cut, [work], f"a-{attempt}")
    run_chain(cut, [work], "a-9")
    assert state_bits(cut, work.key()) == state_bits(straight, work.key())
    assert state(cut, work)["loss_scale"]["skipped"] > 2


def test_forks_of_a_prefix_have_its_scale(tmp_path: Path) -> None:
    shared, alone = fresh(tmp_path, "shared"), fresh(tmp_path, "alone")
    forks = [segments([("", 0, 4), (frozen, 4, 12)], HALF) for frozen in ("router", "expert")]
    run_chain(shared, [forks[0][0]], "prefix")
    for index, fork in enumerate(forks):
        run_chain(shared, [fork[1]], f"fork-{index}")
    run_chain(alone, forks[1])
    assert state_bits(shared, forks[1][1].key()) == state_bits(alone, forks[1][1].key())


def test_an_applied_step_is_that_of_unscaled_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any scale, and without one in fp32, a run moves the weights alike, but for fp16's rounding."""
    monkeypatch.setattr(scale, "GROWTH_STEPS", 1000)
    moved = []
    for precision, first in (("fp32", 1.0), ("fp16", 2.0**8), ("fp16", 2.0**10)):
        monkeypatch.setattr(scale, "FIRST", first)
        (work,) = segments([("", 0, 4)], dataclasses.replace(HALF, steps=4, precision=precision))
        store = fresh(tmp_path, f"{precision}-{first}")
        run_chain(store, [work])
        begun, ended = (tensors(store, key, "weights") for key in (init_work().key(), work.key()))
        moved.append(torch.cat([(ended[name] - begun[name]).flatten() for name in sorted(begun)]))
        assert "loss_scale" not in state(store, work) or state(store, work)["loss_scale"]["skipped"] == 0
    for other in moved[1:]:
        assert torch.linalg.vector_norm(other - moved[0]) < 0.2 * torch.linalg.vector_norm(moved[0])
    assert torch.linalg.vector_norm(moved[2] - moved[1]) < 0.05 * torch.linalg.vector_norm(moved[1])


def test_what_no_scale_cures_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "FIRST", 4.0)
    monkeypatch.setattr(TorchEngine, "gradient_norm", lambda self: torch.tensor(float("inf")))
    store = fresh(tmp_path, "store")
    with pytest.raises(NotFinite, match="step 3"):  # 4, 2, and at 1 it is no matter of the scale
        run_chain(store, segments([("", 0, 12)], HALF))


def test_the_scale_grows_after_applied_steps_in_a_row() -> None:
    grown = LossScale(8.0)
    for _ in range(3):
        grown.apply("fp16")
    assert grown == LossScale(16.0, 0, 0)
    grown.apply("fp16")
    assert grown.skip()
    assert grown == LossScale(8.0, 0, 1)
    assert LossScale.from_json(json.loads(json.dumps(grown.to_json()))) == grown
    assert LossScale.of("mixed").value == 1.0
