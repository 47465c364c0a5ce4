"""Early stopping: the phase keeps its length, what is left has the weights it stopped with, and all of it is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.node.preemption import Preempted
from jobs.train.stopping import Stopping
from orchestrator.errors import GridError
from orchestrator.plan.graph import build_graph
from orchestrator.report.tables import stopped
from orchestrator.spec.cell import StopSpec, TrainSpec
from orchestrator.spec.work import TrainWork
from orchestrator.store import Store
from tests.training import EXECUTION, TRAIN, run_chain, segments, state_bits, tensors, weights
from tests.unit.conftest import Load
from tests.unit.test_train_exactness import fresh, stop_after

# Means of windows of 2 steps, and the step that each makes the last one.
SEEN = [5.0, 4.0, 4.1, 3.95, 3.94, 3.93, 3.2]
NEVER: int = 0


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize(
    "stop, last",
    [
        (StopSpec("lm_loss", every=2, patience=1), 6),
        (StopSpec("lm_loss", every=2, patience=2), NEVER),
        (StopSpec("lm_loss", every=2, patience=3, improvement=0.1), 10),
        (StopSpec("lm_loss", every=2, patience=4, improvement=0.065), NEVER),
        (StopSpec("lm_loss", every=2, below=4.0), 8),
        (StopSpec("lm_loss", every=3, below=3.5), NEVER),
        (StopSpec(), NEVER),
    ],
)
def test_training_ends_with_the_window_that_meets_the_condition(stop: StopSpec, last: int) -> None:
    stopping = Stopping()
    for step in range(1, 2 * len(SEEN) + 1):
        stopping.see(stop, {"train/lm_loss": SEEN[(step - 1) // 2] + (-1) ** step * 0.5}, step)
        stopping = Stopping.from_json(json.loads(json.dumps(stopping.to_json())))  # as a state keeps it
        if stopping.at:
            break
    assert stopping.at == last


def early(stop: StopSpec, **changes: Any) -> TrainSpec:
    return dataclasses.replace(TRAIN, steps=16, stop=stop, **changes)


def info(store: Store, work: TrainWork) -> dict[str, Any]:
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    return dict(manifest.info)


def test_what_is_left_is_not_trained_and_every_way_there_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = early(StopSpec("lm_loss", every=3, below=100.0))  # after the first window
    schedule = [("", 0, 2), ("", 2, 8), ("router", 8, 12), ("router", 12, 16)]
    works = segments(schedule, train)
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    run_chain(straight, works)
    for number, work in enumerate(works):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            if number < 2:  # later ones take no step
                with pytest.raises(Preempted):
                    run_chain(cut, [work], f"a-{number}")
        run_chain(cut, [work], f"b-{number}")
    for work in works:
        assert state_bits(cut, work.key()) == state_bits(straight, work.key())
    assert [info(straight, work).get("stopped_at") for work in works] == [None, 3, 3, 3]
    assert [info(straight, work)["step"] for work in works] == [2, 8, 12, 16]
    assert info(straight, works[-1])["total"] == 16
    assert info(straight, works[2])["steps_run"] == 0
    assert len({weights(straight, work.key()) for work in works[1:]}) == 1
    # They are those of a run that was planned as long and cut there.
    (three,) = segments([("", 0, 3)], train)
    run_chain(straight, [three], "three")
    assert weights(straight, three.key()) == weights(straight, works[-1].key())
    assert all(
        torch.equal(value, tensors(straight, works[-1].key(), "optimizer")[name])
        for name, value in tensors(straight, three.key(), "optimizer").items()
    )


def test_the_window_that_training_ends_in_is_logged(tmp_path: Path) -> None:
    """Every fourth step is, and the third was the last."""
    works = segments([("", 0, 2), ("", 2, 16)], early(StopSpec("lm_loss", every=3, below=100.0)))
    found = {}
    for every in (4, 1):
        store = fresh(tmp_path, f"every-{every}")
        run_chain(store, works, execution=dataclasses.replace(EXECUTION, log_every=every))
        made = [manifest for work in works if (manifest := store.artifacts.get(work.key()))]
        rows = [row for one in made for row in json.loads(store.artifacts.read(one.blob("series.json")))]
        found[every] = {row["step"]: row["train/lm_loss"] for row in rows}
    assert list(found[4]) == [1, 3]
    assert found[4][3] == pytest.approx((found[1][2] + found[1][3]) / 2)


def test_a_condition_that_is_not_met_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    store = fresh(tmp_path, "store")
    (plain,) = segments([("", 0, 6)], dataclasses.replace(TRAIN, steps=6))
    (watched,) = segments([("", 0, 6)], dataclasses.replace(early(StopSpec("loss", every=2, patience=5)), steps=6))
    run_chain(store, [plain])
    run_chain(store, [watched], "b")
    assert plain.key() != watched.key()
    assert weights(store, plain.key()) == weights(store, watched.key())
    assert "stopped_at" not in info(store, watched)


def test_cells_that_stop_alike_share_their_first_half_and_others_keep_their_keys(load: Load) -> None:
    def keys(text: str) -> list[str]:
        return [item.id for item in load(text).cells]

    usual = keys("factors: {freeze: [none, none->router]}")
    assert keys("factors: {freeze: [none, none->router]}\nset: {finetune.stop: {every: 5}}") == usual
    grid = load(
        "factors: {freeze: [none->expert, none->router], stop_patience: [1, 2]}\nset: {finetune.stop.metric: lm_loss}"
    )
    assert len({item.id for item in grid.cells} | set(usual)) == 6
    trained = [
        stage for stage in build_graph(grid).stages.values() if stage.kind == "train" and stage.phase == "finetune"
    ]
    assert len(trained) == 6  # a first half for each condition, four second halves


@pytest.mark.parametrize(
    "stop, said",
    [
        ("metric: lm_loss", "has no condition"),
        ("metric: lm_los, patience: 1", "did you mean 'lm_loss'"),
        ("metric: lm_loss, patience: 1, every: 100000", "is longer than the"),
        ("metric: lm_loss, patience: -1", "must be at least 0"),
        ("metric: lm_loss, patience: 1, every: 0", "must be at least 1"),
        ("metric: lm_loss, below: 1, improvement: 0.1", "no effect without stop.patience"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(load: Load, stop: str, said: str) -> None:
    with pytest.raises(GridError, match=said):
        load(f"set: {{finetune.stop: {{{stop}}}}}")


def test_a_factor_without_a_metric_has_no_effect_and_says_so(load: Load) -> None:
    with pytest.raises(GridError, match=r"stop\.metric is empty"):
        load("factors: {stop_patience: [1, 2]}")


def test_a_table_says_what_was_not_trained() -> None:
    from types import SimpleNamespace as Plain

    manifests = {
        "a": Plain(info={"stopped_at": 30, "total": 80, "phase": "finetune"}),
        "b": Plain(info={"total": 80, "phase": "finetune"}),
        "c": Plain(info={"stopped_at": 80, "total": 80, "phase": "finetune"}),
    }
    cells = [Plain(name=f"cell {key}", document={"stages": [key, "missing"]}) for key in "abc"]
    found = stopped(Plain(cells=cells, manifests=manifests))  # type: ignore[arg-type]
    assert found == ["cell a: finetune stopped early, after step 30 of 80"]
