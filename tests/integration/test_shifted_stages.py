"""What MoE-RBench shifts: routing on SST-2 in other styles, and BOSS's sets after the one that is tuned on."""

from __future__ import annotations

import io

import numpy as np
import pytest

from orchestrator.catalog.benchmarks import BOSS, STYLES
from tests.integration.stages import run_stages
from tests.integration.test_suite_stages import Made, columns, evaluation, table
from tests.integration.test_suite_stages import made as made


def test_routing_shift_is_the_distance_of_mean_routing_from_the_clean_twins(made: Made) -> None:
    work = evaluation(made, "shifted_routing", "sst2_styles")
    manifest = run_stages(made.store, [work])[0]
    body = made.store.artifacts.read(manifest.blob("routing_shift.npz"))
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        moved = {name: arrays[name] for name in arrays.files}
    assert set(moved) == {f"sst2_{style}" for style in STYLES}
    for name, distance_L in moved.items():
        assert distance_L.shape == (work.model.num_layers,)
        assert (distance_L > 0).all()
        assert (distance_L < 2).all()
        assert manifest.metrics[f"{name}/routing_shift"] == pytest.approx(distance_L.mean())
    assert manifest.metrics["sst2_styles_routing_shift"] == pytest.approx(np.mean(list(moved.values())))
    assert manifest.metrics.keys() == columns(made, "shifted_routing")


@pytest.mark.parametrize("name", BOSS)
def test_sets_of_boss_are_other_items_than_the_one_that_is_tuned_on(made: Made, name: str) -> None:
    """So a drop is between two sets, and its error that of both."""
    work = evaluation(made, "ood", name)
    manifest = made.store.artifacts.get(work.key()) or run_stages(made.store, [work])[0]
    clean, *shifted = BOSS[name][1]
    of = {one: [r["acc"] for r in table(made, work) if r["task"] == f"{name}_{one}"] for one in (clean, *shifted)}
    for one in shifted:
        drop = f"{name}_{one}/drop"
        assert manifest.metrics[drop] == pytest.approx(np.mean(of[clean]) - np.mean(of[one]))
        errors = [np.std(values, ddof=1) / np.sqrt(len(values)) for values in (of[clean], of[one])]
        assert manifest.info["stderr"][drop] == pytest.approx(np.hypot(*errors))
    classes = {"boss_nli": 3, "boss_sa": 3, "boss_td": 2}[name]
    assert manifest.info["chance"][f"{name}_{clean}/acc"] == pytest.approx(1 / classes)
