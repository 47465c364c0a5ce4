"""A committed state is that of its own step, however slow the store is, and earlier stores' meters are mended."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.train.loop import StepResult, Trainer
from jobs.train.meter import Meter
from orchestrator.spec.work import TrainWork
from orchestrator.store import Blob, Manifest, Store
from tests.training import EXECUTION, init_work, prepare, run_chain, segments

EVERY_STEP = dataclasses.replace(EXECUTION, checkpoint_steps=1)
STEPS = 16
LOG_EVERY = EXECUTION.log_every
Values = dict[int, dict[str, float]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def fresh(path: Path, delay: float = 0.0) -> Store:
    """Return a store with initial weights; `delay` is what every blob's upload takes at least."""
    store = prepare(str(path))
    write = store.artifacts.write_blob

    def slowly(attempt: str, name: str, source: Path | bytes) -> Blob:
        time.sleep(delay)
        return write(attempt, name, source)

    store.artifacts.write_blob = slowly  # type: ignore[method-assign]
    run_chain(store, [init_work()], "init")
    return store


def manifests(store: Store) -> dict[str, Manifest]:
    return store.artifacts.many(store.artifacts.keys())


def blob(store: Store, manifest: Manifest, name: str) -> Any:
    return json.loads(store.artifacts.read(manifest.blob(name)))


def series(store: Store, manifest: Manifest) -> list[dict[str, float]]:
    """Return a segment's logged rows without times, rates and memory."""
    rows = blob(store, manifest, "series.json")
    observed = ("time", "train/tokens_per_second", "system/rss_gb")
    return [{name: value for name, value in row.items() if name not in observed} for row in rows]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Step -> what the step's result said, over the latest run."""
    values: Values = {}
    original = Trainer.train_step

    def recorded(self: Trainer, *arguments: Any, **options: Any) -> StepResult:
        result = original(self, *arguments, **options)
        values[self.step] = {**result.values, "assigned": sum(map(sum, result.counts_LN))}
        return result

    monkeypatch.setattr(Trainer, "train_step", recorded)
    return values


def test_undisturbed_twice_leaves_equal_manifests_however_slow_the_store_is(tmp_path: Path, seen: Values) -> None:
    works = segments([("", 0, 6), ("router", 6, STEPS)])
    quick, slow = fresh(tmp_path / "quick"), fresh(tmp_path / "slow", delay=0.05)
    for store in (quick, slow):
        run_chain(store, works, execution=EVERY_STEP)
    ours, theirs = manifests(quick), manifests(slow)
    common = ours.keys() & theirs.keys()
    assert {work.key() for work in works} <= common
    assert {key: ours[key].digest for key in common} == {key: theirs[key].digest for key in common}
    for key in common:
        assert ours[key].parents == theirs[key].parents
        assert ours[key].metrics == theirs[key].metrics
    states = [manifest for manifest in theirs.values() if manifest.kind == "train"]
    assert len(states) > len(works)
    for state in states:
        if state.key in ours:
            assert series(slow, state) == series(quick, ours[state.key])
        step = state.info["step"]
        logged = max(1, step - step % LOG_EVERY)
        window = [seen[number] for number in range(logged + 1, step + 1)]
        meter = blob(slow, state, "state.json")["meter"]
        assert meter["steps"] == len(window)
        assert sum(map(sum, meter["counts"])) == sum(values["assigned"] for values in window)
        assert meter["sums"] == {
            name: sum(values[name] for values in window) for name in meter["sums"] if name != "assigned"
        }


def test_a_fork_from_a_slow_store_logs_what_an_unforked_run_logs(tmp_path: Path) -> None:
    whole, (first, second) = segments([("", 0, STEPS)]), segments([("", 0, 6), ("", 6, STEPS)])
    straight, forked = fresh(tmp_path / "straight"), fresh(tmp_path / "forked", delay=0.05)
    run_chain(straight, whole)
    # What a job that was killed between the segments leaves: the prefix was trained in a longer chain.
    run_chain(forked, [first, second], "chain")
    forked.artifacts.discard(second.key())
    run_chain(forked, [second], "again")
    rows = series(straight, manifests(straight)[whole[0].key()])
    parts = [series(forked, manifests(forked)[work.key()]) for work in (first, second)]
    assert [row for part in parts for row in part] == rows


def test_a_meter_that_was_handed_out_does_not_change() -> None:
    meter = Meter()
    meter.add({"train/lm_loss": 5.0}, [[1.0, 1.0]])
    taken = meter.to_json()
    meter.add({"train/lm_loss": 5.0}, [[1.0, 1.0]])
    assert taken == {"steps": 1, "sums": {"train/lm_loss": 5.0}, "counts": [[1.0, 1.0]], "collapsed": 0}


def as_earlier(store: Store, work: TrainWork, *, later_steps: int) -> None:
    """Make the state one of an earlier version: format 1, whose sums and counts went on for `later_steps` steps."""
    manifest = manifests(store)[work.key()]
    state = blob(store, manifest, "state.json")
    assert state["format"] == 2
    state["format"] = 1
    meter = state["meter"]
    layers, experts = 2, 4
    counts = meter["counts"] or [[0.0] * experts for _ in range(layers)]
    if later_steps:
        names = blob(store, manifest, "series.json")[-1]
        meter["sums"] = {name: meter["sums"].get(name, 0.0) + 9.0 * later_steps for name in names if "train/" in name}
        meter["counts"] = [[count + 8.0 * later_steps for count in row] for row in counts]
    written = store.artifacts.write_blob("earlier", "state.json", json.dumps(state).encode())
    blobs = [written if known.name == "state.json" else known for known in manifest.blobs]
    store.artifacts.discard(work.key())
    store.artifacts.commit(dataclasses.replace(manifest, blobs=tuple(blobs)))


@pytest.mark.parametrize(("cut", "later_steps"), [(8, 0), (8, 3), (6, 0)])
def test_what_an_earlier_version_wrote_is_read_as_it_should_have_been(
    tmp_path: Path, cut: int, later_steps: int
) -> None:
    straight, store = fresh(tmp_path / "straight"), fresh(tmp_path / "store")
    first, second = segments([("", 0, cut), ("router", cut, STEPS)])
    run_chain(straight, [first, second])
    run_chain(store, [first], "first")
    as_earlier(store, first, later_steps=later_steps)
    run_chain(store, [second], "second")
    assert series(store, manifests(store)[second.key()]) == series(straight, manifests(straight)[second.key()])


def test_a_window_that_cannot_be_mended_begins_anew_and_says_so(
    tmp_path: Path, seen: Values, caplog: pytest.LogCaptureFixture
) -> None:
    store = fresh(tmp_path)
    first, second = segments([("", 0, 6), ("router", 6, STEPS)])
    run_chain(store, [first], "first")
    as_earlier(store, first, later_steps=2)
    run_chain(store, [second], "second")
    row = next(row for row in series(store, manifests(store)[second.key()]) if row["step"] == 8)
    assert row["train/lm_loss"] == pytest.approx((seen[7]["train/lm_loss"] + seen[8]["train/lm_loss"]) / 2)
    assert "state at step 6" in caplog.text
    assert "mean over the steps from here on" in caplog.text
