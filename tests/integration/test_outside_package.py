"""A package that the project does not know provides a loss, a metric and a suite; a grid of jobs uses them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.report.collect import collect
from orchestrator.report.html import page
from orchestrator.store import Store
from tests.packages import found, install
from tests.small_grid import GRID, made_up_text, moegrid

MODULE = """
from dataclasses import dataclass

from orchestrator.catalog.losses import LossKind
from orchestrator.catalog.metrics import MetricKind
from orchestrator.catalog.suites import SuiteKind


@dataclass(frozen=True)
class Hinge:
    margin: float = 0.5


def hinge(routing, parameters):
    over = (routing.scores.max(-1).values - parameters.margin).clamp_min(0)
    return over[routing.mask].mean()


def confident(routing):
    return routing.scores.max(-1).values


@dataclass(frozen=True)
class Scale:
    factor: float = 1.0


def weigh(context, work, parameters):
    from jobs.evaluate.state import load_state

    model = load_state(context, work).model
    total = sum(float(weight.detach().abs().sum()) for weight in model.parameters())
    context.commit(work, blobs={}, metrics={"weight_sum": parameters.factor * total}, info={})


WEIGH = SuiteKind("weigh", "outside_small:weigh", reads=(), settings=(), columns=("weight_sum",), parameters=Scale)
WEIGHT = MetricKind("weight_sum", better=-1, description="sum of the weights' absolute values")
HINGE = LossKind("hinge", "outside_small:hinge", Hinge)
CONFIDENT = MetricKind("confident", "outside_small:confident", low=0.0, high=1.0, better=-1, description="best score")
"""
ENTRIES = {
    "losses": {"hinge": "outside_small:HINGE"},
    "metrics": {"confident": "outside_small:CONFIDENT", "weight_sum": "outside_small:WEIGHT"},
    "suites": {"weigh": "outside_small:WEIGH"},
}


def test_a_grid_trains_with_its_loss_and_tables_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install(site, "outside_small", MODULE, ENTRIES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
    folder = made_up_text(tmp_path)
    grid, store = folder / "small.yaml", tmp_path / "store"
    text = GRID.format(at="[1.0]", folder=folder)
    text = text.replace("factors: {freeze: [none, none->router]}", "factors: {losses.hinge: [0, 5.0]}")
    text = text.replace("baseline: {freeze: none}", "baseline: {losses.hinge: 0}")
    text = text.replace("evaluate: [lm]", "evaluate: [lm, probe, weigh]\nprimary: [val_loss, confident, weight_sum]")
    text += "  evaluate: {tasks: {}, metrics: [confident], suite_parameters: {weigh: {factor: 2}}}\n"
    grid.write_text(text + "  finetune.balance.losses: {hinge: {coef: 1, margin: 0.1}}\n")
    with found(site, "outside_small"):
        moegrid("run", str(grid), "--store", str(store), "--tracking", "none")
        cells = json.loads(moegrid("status", str(grid), "--store", str(store), "--json"))["cells"]
        values = {cell["factors"]["losses.hinge"]: cell["metrics"]["confident"] for cell in cells}
        assert 0 < values[5.0] < values[0.0] < 1, "the loss lowers the best scores"
        table = moegrid("table", str(grid), "--store", str(store), "--format", "csv")
        assert "confident" in table.splitlines()[0]
        results = collect("small", Store.peek(str(store)))
        series = results.series(results.cells)
        logged = {name for rows in series.values() for row in rows for name in row}
        assert "train/loss_hinge" in logged
        html = page(results)
        assert "confident, lower is better" in html
        assert "weight sum, lower is better" in html
        assert all(cell["metrics"]["weight_sum"] > 0 for cell in cells)
        assert "confident: best score, by layer" in html
