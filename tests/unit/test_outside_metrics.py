"""A metric of another package: asked for in YAML, computed by the probe, in its range, known to tables and keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.probe.collect import probe
from jobs.probe.metrics import MetricOutOfRange
from jobs.probe.sets import routings_of, sequence_batches, token_batch
from orchestrator import registry
from orchestrator.catalog.metrics import METRICS
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.columns import columns_of
from orchestrator.grid.load import Grid
from orchestrator.plan.graph import build_graph
from orchestrator.report.differences import direction
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.work import EvaluateWork
from tests.packages import found, install
from tests.unit.conftest import Load, Told

MODULE = """
from dataclasses import dataclass

from orchestrator.catalog.metrics import MetricKind


@dataclass(frozen=True)
class Above:
    threshold: float = 0.5


def confident(routing, parameters):
    return (routing.scores.max(-1).values > parameters.threshold).float()


def idle(totals):
    return (totals.counts_LN == 0).mean(-1)


def negative(routing):
    return routing.scores.sum(-1) - 2


def scalar(routing):
    return routing.scores.mean()


CONFIDENT = MetricKind("confident", "outside_metrics:confident", Above, 0.0, 1.0, better=-1, description="sure tokens")
IDLE = MetricKind("idle_experts", "outside_metrics:idle", low=0.0, high=1.0, reads="totals")
NEGATIVE = MetricKind("negative", "outside_metrics:negative", low=0.0)
SCALAR = MetricKind("scalar", "outside_metrics:scalar")
"""
ENTRIES = {
    "metrics": {
        "confident": "outside_metrics:CONFIDENT",
        "idle_experts": "outside_metrics:IDLE",
        "negative": "outside_metrics:NEGATIVE",
        "scalar": "outside_metrics:SCALAR",
    }
}
PROBED = "factors: {seed: [0]}\nevaluate: [lm, probe]\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path) -> Iterator[None]:
    install(tmp_path / "site", "outside_metrics", MODULE, ENTRIES)
    with found(tmp_path / "site", "outside_metrics"):
        yield


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    moe = MoESpec(num_experts=8, top_k=2, expert_width=16)
    return build_model(ModelSpec(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe), 97).eval()


def asked(grid: Grid) -> dict[str, dict[str, object]]:
    return {name: dict(given) for name, given in grid.cells[0].cell.evaluate.metrics.items()}


def probes(grid: Grid) -> set[str]:
    """Return the keys of what the grid measures, of probes alone and of the rest."""
    works = [stage.work for stage in build_graph(grid).stages.values()]
    return {work.key() for work in works if isinstance(work, EvaluateWork) and work.suite == "probe"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[confident, idle_experts]", {"confident": {}, "idle_experts": {}}),
        ("{confident: {threshold: 0.5}}", {"confident": {}}),
        ("{confident: {threshold: 1}, idle_experts: false}", {"confident": {"threshold": 1.0}}),
    ],
)
def test_a_grid_asks_for_it(load: Load, written: str, read: object) -> None:
    assert asked(load(PROBED + f"set: {{evaluate.metrics: {written}}}\n")) == read


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("set: {evaluate.metrics: [confidnt]}", "metric 'confidnt' is unknown", "did you mean 'confident'?"),
        ("set: {evaluate.metrics: {confident: {treshold: 1}}}", "treshold is no parameter", "did you mean 'threshold'"),
        ("set: {evaluate.metrics: {idle_experts: {x: 1}}}", "is no parameter of metric", "it has none"),
        ("set: {evaluate.metrics: [load_balance]}", "is moegrid's own", "the suite efficiency makes it"),
        ("set: {evaluate.metrics: [confident, confident]}", "names 'confident' twice", ""),
        ("primary: [confident]", "primary names 'confident', which no evaluation", ""),
    ],
)
def test_what_is_wrong_is_told(told: Told, text: str, message: str, hint: str) -> None:
    problem = told(PROBED + text + "\n")
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:4")


def test_it_needs_the_probe(load: Load) -> None:
    with pytest.raises(GridError, match="the suite probe computes these metrics"):
        load("factors: {seed: [0]}\nevaluate: [lm]\nset: {evaluate.metrics: [confident]}\n")


def test_its_columns_may_be_primary_and_their_direction_is_known(load: Load) -> None:
    grid = load(PROBED + "set: {evaluate.metrics: [confident]}\nprimary: [confident, piqa/confident]\n")
    assert {"confident", "piqa/confident", "router_margin"} <= columns_of(grid.cells[0].cell)
    assert (direction("piqa/confident"), direction("idle_experts"), direction("no_such")) == (-1, 0, 0)


def test_it_renews_probes_alone_and_no_cell(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    without, with_it = load(PROBED), load(PROBED + "set: {evaluate.metrics: [confident]}\n")
    assert [item.id for item in without.cells] == [item.id for item in with_it.cells]
    before, after = build_graph(without).stages, build_graph(with_it).stages
    assert {before[key].suite for key in set(before) - set(after)} == {"probe"}
    old = probes(with_it)
    object.__setattr__(METRICS.outside["confident"].declaration, "version", 2)
    assert not old & probes(with_it)


def test_a_grid_that_asks_for_nothing_scans_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_names_of_packages", lambda group: pytest.fail(f"it scanned {group}"))
    build_graph(load(PROBED + "primary: [router_margin]\n"))


def test_a_value_a_token_is_a_mean_over_real_tokens_and_layers(model: CausalLM) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 97, length) for length in (5, 40, 17)]
    wanted = {"confident": {"threshold": 0.14}, "idle_experts": {}}
    collector = probe(model, {"heldout": sequence_batches(texts, None, "cpu"), "task": []}, asked=wanted)
    with torch.inference_mode():
        records = [routings_of(model, token_batch([text], None, "cpu")) for text in texts]
    by_layer = [
        torch.cat([(of[layer].scores.max(-1).values > 0.14).float() for of in records]).mean().item()
        for layer in range(2)
    ]
    metrics, arrays = collector.metrics(), collector.arrays()
    assert 0 < metrics["confident"] < 1
    assert metrics["confident"] == pytest.approx(np.mean(by_layer))
    assert arrays["heldout.confident"] == pytest.approx(by_layer)
    assert metrics["idle_experts"] == (collector.totals["heldout"].counts_LN == 0).mean()


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [("negative", MetricOutOfRange, "outside its range 0..inf"), ("scalar", MoegridError, r"returns shape \[\]")],
)
def test_what_it_may_not_be_is_refused(model: CausalLM, name: str, error: type[Exception], said: str) -> None:
    batch = token_batch([np.arange(30)], None, "cpu")
    with pytest.raises(error, match=said):
        probe(model, {"heldout": [batch]}, asked={name: {}}).metrics()
