"""Schedules of the learning rate and of the losses' coefficients: their values, keys, exact resume, and errors."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.node.preemption import Preempted
from jobs.train.schedule import balance_at, lr_factor, warmup_steps
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import BalanceSpec, TrainSpec
from orchestrator.spec.work import Conditions
from tests.training import TRAIN, run_chain, segments, state_bits
from tests.unit.test_train_exactness import fresh, series, stop_after

POINTS = ((0.0, 0.0), (0.25, 1.0), (0.5, 0.5), (1.0, 0.0))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def phase(schedule: str, steps: int = 200, warmup_ratio: float = 0.05, **given: object) -> TrainSpec:
    parameters = Parameters(given)
    changes: dict[str, Any] = {
        "schedule": schedule,
        "schedule_parameters": parameters,
        "steps": steps,
        "warmup_ratio": warmup_ratio,
    }
    return dataclasses.replace(TRAIN, **changes)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("steps", "decay"), [(200, 0.1), (37, 0.33), (200, 0.95)])
def test_wsd_has_the_rates_of_transformers(shape: str, steps: int, decay: float) -> None:
    from transformers.optimization import get_wsd_schedule

    train = phase("wsd", steps, decay=decay, shape=shape)
    warm, falling = warmup_steps(train), math.floor(decay * steps + 0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_wsd_schedule(
        optimizer, warm, falling, num_training_steps=steps, decay_type=shape, min_lr_ratio=train.min_lr_ratio
    ).lr_lambdas[0]
    falling = min(falling, steps - warm)
    assert [lr_factor(train, step) for step in range(warm, steps)] == pytest.approx(
        [theirs(step) for step in range(warm, steps)]
    )
    assert lr_factor(train, steps - falling) == 1.0
    assert steps - falling == warm or lr_factor(train, steps - falling - 1) == 1.0


@pytest.mark.parametrize("timescale", [0, 40])
def test_inverse_square_root_has_the_rates_of_transformers(timescale: int) -> None:
    from transformers.optimization import get_inverse_sqrt_schedule

    train = phase("inverse_sqrt", timescale=timescale)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, 10, timescale or None).lr_lambdas[0]
    assert [lr_factor(train, step) for step in range(10, 200)] == pytest.approx([theirs(s) for s in range(10, 200)])
    assert lr_factor(train, 10) == 1.0


def test_points_are_the_whole_curve() -> None:
    train = phase("points", 100, 0.03, points=POINTS)
    assert warmup_steps(train) == 0
    wanted = {0: 0.0, 5: 0.2, 25: 1.0, 30: 0.9, 50: 0.5, 75: 0.25, 99: 0.01}
    assert {step: lr_factor(train, step) for step in wanted} == pytest.approx(wanted)
    level = phase("points", 100, points=((0.4, 0.5), (0.6, 2.0)))
    assert [lr_factor(level, step) for step in (0, 40, 60, 99)] == [0.5, 0.5, 2.0, 2.0]


def test_coefficients_go_down_to_nothing_without_a_warm_up() -> None:
    balance = BalanceSpec(
        aux_coef=0.1,
        z_coef=0.01,
        aux_schedule="linear",
        z_schedule="points",
        z_schedule_parameters=Parameters({"points": ((0.0, 0.0), (0.5, 2.0))}),
    )
    train = dataclasses.replace(TRAIN, steps=10, balance=balance, min_lr_ratio=0.5, warmup_ratio=0.5)
    at = [balance_at(train, step) for step in (0, 5, 9)]
    assert [one.aux_coef for one in at] == pytest.approx([0.1, 0.05, 0.01])
    assert [one.z_coef for one in at] == pytest.approx([0.0, 0.02, 0.02])
    assert balance_at(TRAIN, 7) is TRAIN.balance


SCHEDULED = dataclasses.replace(
    phase("wsd", 12, decay=0.5, shape="1-sqrt"),
    balance=BalanceSpec(
        aux_coef=0.5, aux_schedule="points", aux_schedule_parameters=Parameters({"points": ((0.0, 1.0), (0.6, 0.0))})
    ),
)


def test_resumed_and_forked_runs_have_the_bits_of_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, cut, forked = (fresh(tmp_path, name) for name in ("straight", "cut", "forked"))
    works = segments([("", 0, 6), ("router", 6, 12)], SCHEDULED)
    run_chain(straight, works)
    (row, *_, last) = series(straight, works[0]) + series(straight, works[1])
    assert last["train/aux_coef"] == 0.0
    assert row["train/aux_coef"] == 0.5
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Preempted):
            run_chain(cut, works)
    run_chain(cut, works[1:], "b")
    other = segments([("", 0, 6), ("expert", 6, 12)], SCHEDULED)
    assert other[0].key() == works[0].key(), "the schedules share their first half"
    run_chain(forked, other)
    run_chain(forked, works[1:], "b")
    for store in (cut, forked):
        assert state_bits(store, works[1].key()) == state_bits(straight, works[1].key())


def test_the_coefficient_at_a_step_is_what_trains(tmp_path: Path) -> None:
    off, never, on = (fresh(tmp_path, name) for name in ("off", "never", "on"))
    zero = dataclasses.replace(SCHEDULED.balance, aux_schedule_parameters=Parameters({"points": ((0.0, 0.0),)}))
    for store, balance in (
        (off, zero),
        (never, BalanceSpec(aux_coef=0.0)),
        (on, BalanceSpec(aux_coef=0.5)),
    ):
        (work,) = segments([("", 0, 4)], dataclasses.replace(SCHEDULED, balance=balance))
        run_chain(store, [work])
        weights = state_bits(store, work.key())["weights"]
        if store is off:
            first = weights
        assert (weights == first) == (store is not on)


def load(folder: Path, text: str) -> Grid:
    path = folder / "g.yaml"
    path.write_text(f"name: g\nbase: pretrain\nevaluate: [lm]\n{text}\n")
    return load_grid(str(path))


def test_what_differs_has_another_key_and_nothing_else_has() -> None:
    def digest(**changes: Any) -> str:
        return Conditions("pretrain", dataclasses.replace(TRAIN, **changes), "t", 0).digest()

    balance = TRAIN.balance
    others = [
        digest(),
        digest(schedule="wsd"),
        digest(schedule="wsd", schedule_parameters=Parameters({"decay": 0.2})),
        digest(schedule="inverse_sqrt"),
        digest(schedule="points"),
        digest(balance=dataclasses.replace(balance, aux_schedule="linear")),
        digest(balance=dataclasses.replace(balance, z_schedule="linear")),
    ]
    assert len(set(others)) == len(others)
    assert digest(balance=dataclasses.replace(balance, aux_schedule="constant")) == others[0]


def test_a_grid_varies_schedules_and_freezes_share_their_prefix(tmp_path: Path) -> None:
    grid = load(
        tmp_path,
        "factors: {schedule: [cosine, wsd, points], aux_schedule: [constant, linear], freeze: [none, none->router]}\n"
        "with: {schedule: {wsd: {schedule_parameters.decay: 0.2}, points: {schedule_parameters.points: "
        "[[0, 0.1], [0.5, 1], [1, 0]]}}}\nat: [1.0]",
    )
    points = [cell.cell.pretrain for cell in grid.cells if cell.factors["schedule"] == "points"]
    assert {train.schedule_parameters["points"] for train in points if train} == {((0.0, 0.1), (0.5, 1.0), (1.0, 0.0))}
    graph = build_graph(grid)
    runs = [stage for stage in graph.stages.values() if stage.kind == "train"]
    assert (len(grid.cells), len(runs)) == (12, 18), "six first halves, twelve second ones"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set: {pretrain: {schedule: wsd, schedule_parameters: {decay: 0}}}", "decay must be above 0 and at most 1"),
        (
            "set: {pretrain: {schedule: wsd, schedule_parameters: {shape: sqrt}}}",
            "linear, cosine or 1-sqrt, not 'sqrt'",
        ),
        (
            "set: {pretrain: {schedule: wsd, warmup_ratio: 0.5, schedule_parameters: {decay: 0.6}}}",
            r"warmup_ratio 0.5 and decay 0.6 are more than the whole phase",
        ),
        ("set: {pretrain: {schedule: inverse_sqrt, warmup_ratio: 0}}", "has no timescale.*set schedule_parameters"),
        (
            "set: {pretrain: {schedule: points, schedule_parameters: {points: [[0.5, 1], [0.2, 0]]}}}",
            "points must rise from 0 to 1",
        ),
        ("set: {pretrain: {schedule: points, schedule_parameters: {points: [[0, -1]]}}}", "at least 0, not -1"),
        ("set: {pretrain: {schedule: points, schedule_parameters: {points: [0, 1]}}}", "must be 2 numbers, not 0"),
        ("set: {pretrain.balance.aux_schedule: liner}", r"must be one of .*not 'liner'.*did you mean 'linear'"),
        (
            "set: {pretrain.balance: {aux_schedule: wsd, aux_schedule_parameters: {dekay: 1}}}",
            r"schedule 'wsd' has no parameter 'dekay'.*did you mean 'decay'",
        ),
        (
            "set: {pretrain.balance: {z_schedule: inverse_sqrt}}",
            "has no timescale: .*pretrain.yaml:[0-9]+",
        ),
        ("factors: {schedule: [points], warmup_ratio: [0.1, 0.2]}", "the schedule says the whole curve"),
        ("factors: {aux_coef: [0], aux_schedule: [linear, cosine]}", "aux_coef is 0"),
    ],
)
def test_a_wrong_value_is_told_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    text = text if "factors" in text else f"factors: {{seed: [0]}}\n{text}"
    with pytest.raises(GridError) as caught:
        load(tmp_path, text)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
