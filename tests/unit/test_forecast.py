"""The bound that a plan prints, and the end that its schedule comes to, against sums made by hand."""

from __future__ import annotations

import dataclasses
import io

import pytest

from orchestrator.backends.local import Budget
from orchestrator.engine import forecast as forecasts
from orchestrator.engine.forecast import JOB_SECONDS, forecast
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import Clock, flops, parameters
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.ui.console import Console
from orchestrator.ui.plan_view import show_plan

SECONDS = {"prepare": 1.0, "pretrain": 20.0, "finetune": 4.0, "evaluate": 2.0}
STEPS = {"pretrain": 200, "finetune": 25}  # of so many seconds


@pytest.fixture
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


@pytest.fixture
def clock(graph: StageGraph) -> Clock:
    clock = Clock()
    for key, stage in graph.stages.items():
        told = {"train_seconds": SECONDS[stage.phase], "steps_run": STEPS[stage.phase]} if stage.steps else {}
        clock.learn(stage, graph.resources(key), told or {"seconds": SECONDS[stage.phase]})
    return clock


def test_the_bound_is_work_by_cores_or_the_longest_chain(graph: StageGraph, clock: Clock) -> None:
    count = {phase: sum(s.phase == phase for s in graph.stages.values()) for phase in SECONDS}
    assert count == {"prepare": 7, "pretrain": 1, "finetune": 4, "evaluate": 9}  # one of them trains two halves
    one, many = (forecast(make_plan(graph, (), clock=clock), Budget(cores, 64.0, 0)) for cores in (2, 64))
    assert one.work == 7 * 1 + 2 * 20 + 5 * 4 + 9 * 2
    # data, tokenizer, tokens; pretraining; two halves; one evaluation
    assert one.path == many.path == 3 + 20 + 2 * 4 + 2
    assert (one.bound, many.bound) == (one.work / 2, many.path)


def test_the_end_lies_close_to_the_bound(graph: StageGraph, clock: Clock) -> None:
    for cores in (1, 2, 8):
        told = forecast(make_plan(graph, (), clock=clock), Budget(cores, 64.0, 0))
        assert told.simulated
        assert told.bound <= told.makespan <= told.work / told.cores + told.path + 21 * JOB_SECONDS
    # One core: every stage in turn, pretraining's two threads on it, and what its jobs cost besides.
    alone = forecast(make_plan(graph, (), clock=clock), Budget(1, 64.0, 0))
    assert alone.work == 7 + 20 + 20 + 18
    assert 0 < alone.makespan - alone.work <= 21 * JOB_SECONDS


def test_a_large_plan_says_how_late_it_ends_at_worst(
    graph: StageGraph, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "MOST_SIMULATED", 20)
    told = forecast(make_plan(graph, (), clock=clock), Budget(2, 64.0, 0))
    assert not told.simulated
    assert told.makespan == told.work / 1 + told.path  # beside pretraining, which waits for both cores, one may idle
    many = forecast(make_plan(graph, (), clock=clock), Budget(9, 64.0, 0))
    assert many.makespan == many.work / 8 + many.path
    assert told.to_json()["bound"] == round(told.bound, 1)


def test_where_gpus_are_scarcer_than_cores_they_are_the_bound() -> None:
    asked = "set.execution.resources.finetune={cores: 2, gpus: 2, memory_gb: 8}"
    graph = build_graph(load_grid("quickstart", overrides=[asked]))
    clock = Clock()
    for key, stage in graph.stages.items():
        took = {"train_seconds": SECONDS[stage.phase], "steps_run": STEPS[stage.phase]} if stage.steps else {}
        clock.learn(stage, graph.resources(key), took or {"seconds": SECONDS[stage.phase]})
    trained = [key for key, stage in graph.stages.items() if stage.phase in ("prepare", "pretrain")]
    plan = make_plan(graph, trained, clock=clock)
    halves = [key for key in plan.pending if graph.resources(key).gpus]
    assert len(halves) == 4
    seconds = sum(plan.seconds(key) for key in halves)
    for gpus, rounds in ((2, 1.0), (3, 2 / 3), (4, 0.5)):
        told = forecast(plan, Budget(64, 640.0, gpus))
        assert told.gpu_work == 2 * seconds
        assert told.load[0] == pytest.approx(rounds * seconds)
        assert told.load[1] == "GPU"
        assert told.bound == max(told.load[0], told.path) <= told.makespan
    stream = io.StringIO()
    show_plan(plan, Console(stream), budget=Budget(64, 640.0, 2))
    assert "on 64 cores and 2 GPUs: about" in stream.getvalue()
    assert "of work a GPU, longest chain" in stream.getvalue()


def test_what_is_done_or_blocked_takes_no_time(graph: StageGraph, clock: Clock) -> None:
    plan = make_plan(graph, set(graph.stages), clock=clock)
    assert forecast(plan, Budget(2, 64.0, 0)).makespan == 0
    trained = [key for key, stage in graph.stages.items() if stage.phase != "evaluate"]
    failed = {next(iter(graph.stages)): "no data"}
    assert forecast(make_plan(graph, (), failed=failed, clock=clock), Budget(2, 64.0, 0)).makespan < 10
    left = forecast(make_plan(graph, trained, clock=clock), Budget(3, 64.0, 0))
    assert (left.work, left.path) == (18, 2)
    assert left.makespan == 3 * 2 + JOB_SECONDS  # the three of a cell in one job


def test_the_plan_prints_both(graph: StageGraph, clock: Clock) -> None:
    stream = io.StringIO()
    plan = make_plan(graph, (), clock=clock)
    show_plan(plan, Console(stream), budget=Budget(2, 64.0, 0))
    assert "on 2 cores: about" in stream.getvalue()
    assert "bound 43 s (43 s of work a core, longest chain 33 s)" in stream.getvalue()
    stream = io.StringIO()
    show_plan(dataclasses.replace(plan), Console(stream))
    assert "bound" not in stream.getvalue()


def test_a_machine_without_the_gpus_is_told_of_no_end() -> None:
    stream = io.StringIO()
    plan = make_plan(build_graph(load_grid("quickstart", overrides=["set.execution.resources.finetune.gpus=1"])), ())
    for gpus in (0, 1):
        show_plan(plan, Console(stream), budget=Budget(2, 64.0, gpus))
        assert ("bound" in stream.getvalue()) is bool(gpus)


def test_first_guesses_count_whole_windows_of_text_and_half_of_examples() -> None:
    graph = build_graph(load_grid("quickstart", scale="tiny"))
    found = {}
    for stage in graph.stages.values():
        if stage.kind == "train":
            train = stage.form.conditions.train
            whole = stage.steps * train.micro_batch * train.accumulation * train.sequence_length
            found[train.data.format] = flops(stage, 4096) / (6 * parameters(stage.form.model, 4096).active * whole)
    assert found == pytest.approx({"text": 1.0, "instruction": 0.5})
