"""Learning-rate schedules and engines of another package: typed, in keys where they are science, equal when resumed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.node.preemption import Preempted
from jobs.train.schedule import learning_rates, lr_factor
from jobs.train.session import refuse_other_world
from orchestrator.catalog.engines import EngineKind
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError, MoegridError, NumericsError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.memory import least_bytes
from orchestrator.plan.shapes import shapes_of
from orchestrator.spec.cell import TrainSpec
from orchestrator.spec.providers import uses_of
from orchestrator.spec.work import Conditions
from orchestrator.store import Manifest
from tests.packages import found, install
from tests.training import EXECUTION, TRAIN, run_chain, segments, state_bits
from tests.unit.test_train_exactness import fresh, stop_after

PLATEAUS = """
from dataclasses import dataclass

from orchestrator.catalog.engines import EngineKind
from orchestrator.catalog.schedules import ScheduleKind


@dataclass(frozen=True)
class Plateau:
    decay: float = 0.2


def plateau(done, train, parameters):
    left = (1 - done) / parameters.decay
    return min(1.0, train.min_lr_ratio + (1 - train.min_lr_ratio) * left)


def quiet(model, train, rank, world_size):
    from jobs.train.engines.torch import TorchEngine

    class Quiet(TorchEngine):
        def step(self, scale):
            super().step(scale * 0.5)

    return Quiet(model, train, rank, world_size)


PLATEAU = ScheduleKind("plateau", "plateaus:plateau", Plateau, low=True, version=2)
STEPPED = ScheduleKind("stepped", "plateaus:no_such")
QUIET = EngineKind("quiet", "plateaus:quiet", plain_model=True)
PAIR = EngineKind(
    "pair", "plateaus:quiet", least_processes=2, cuts=True, same_world=True, shares=("optimizer",), half_gradients=True
)
"""
NAMES = {
    "schedules": {"plateau": "plateaus:PLATEAU", "stepped": "plateaus:STEPPED"},
    "engines": {"quiet": "plateaus:QUIET", "pair": "plateaus:PAIR"},
}
WITH = dataclasses.replace(
    TRAIN, steps=10, schedule="plateau", schedule_parameters=Parameters({"decay": 0.5}), warmup_ratio=0.2
)


@pytest.fixture(autouse=True)
def plateaus(tmp_path: Path) -> Iterator[Path]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    install(tmp_path / "site", "plateaus", PLATEAUS, NAMES)
    with found(tmp_path / "site", "plateaus") as folder:
        yield folder


def load(folder: Path, text: str) -> Grid:
    path = folder / "g.yaml"
    path.write_text(f"name: g\nbase: pretrain\nevaluate: [lm]\n{text}\n")
    return load_grid(str(path))


def test_its_factor_follows_the_warm_up_and_its_parameters() -> None:
    assert [lr_factor(WITH, step) for step in (0, 1)] == [0.5, 1.0]
    assert [lr_factor(WITH, step) for step in (2, 6)] == [1.0, 1.0]
    assert lr_factor(WITH, 8) == pytest.approx(WITH.min_lr_ratio + (1 - WITH.min_lr_ratio) * 0.5)
    default = dataclasses.replace(WITH, schedule_parameters=Parameters())
    assert lr_factor(default, 8) == 1.0
    assert learning_rates(WITH, 6) == (WITH.lr, WITH.lr)


def test_a_grid_names_it_and_its_package_is_in_the_key(tmp_path: Path) -> None:
    text = "factors: {schedule: [plateau], schedule_parameters.decay: [0.5, 0.2], seed: [0]}"
    cells = [cell.cell.pretrain for cell in load(tmp_path, text).cells]
    assert [dict(train.schedule_parameters) for train in cells if train] == [{"decay": 0.5}, {}]

    def digest(train: TrainSpec) -> str:
        return Conditions("pretrain", train, "t", 0).digest()

    assert len({digest(train) for train in cells if train}) == 2
    (work,) = segments([("", 0, 10)], WITH)
    assert [str(use) for use in uses_of(work)] == ["plateaus 1.2 (schedules: plateau)"]
    assert [str(use) for use in uses_of(work, "quiet")] == ["plateaus 1.2 (engines: quiet; schedules: plateau)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set: {pretrain.schedule: platau}", r"must be one of 'cosine', .*not 'platau'.*did you mean 'plateau'"),
        ("set: {pretrain: {schedule: plateau, schedule_parameters: {decai: 1}}}", r"no parameter 'decai'.*'decay'"),
        ("factors: {schedule: [stepped], min_lr_ratio: [0.1, 0.2]}", "the schedule does not fall to it"),
        ("set: {execution.engine: quit}", r"must be one of 'torch', .*not 'quit'.*did you mean 'quiet'"),
        ("set: {execution.engine: pair}", "engine 'pair' needs 2 processes or more in pretrain"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, text: str, said: str) -> None:
    text = text if "factors" in text else f"factors: {{seed: [0]}}\n{text}"
    with pytest.raises(GridError) as caught:
        load(tmp_path, text)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_an_engine_of_a_package_trains_and_resumes_with_equal_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work,) = segments([("", 0, 10)], WITH)
    assert load(tmp_path, "factors: {seed: [0]}\nset: {execution.engine: quiet}").cells
    execution = dataclasses.replace(EXECUTION, engine="quiet")
    ours, theirs, cut = (fresh(tmp_path, name) for name in ("ours", "theirs", "cut"))
    run_chain(ours, [work])
    run_chain(theirs, [work], execution=execution)
    assert state_bits(theirs, work.key()) != state_bits(ours, work.key()), "it is another engine"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Preempted):
            run_chain(cut, [work], execution=execution)
    run_chain(cut, [work], "b", execution=execution)
    assert state_bits(cut, work.key()) == state_bits(theirs, work.key())


def test_an_unknown_engine_on_a_node_says_which_there_are(tmp_path: Path) -> None:
    (work,) = segments([("", 0, 10)], WITH)
    store = fresh(tmp_path, "store")
    with pytest.raises(MoegridError, match="engine 'qiet' is unknown") as caught:
        run_chain(store, [work], execution=dataclasses.replace(EXECUTION, engine="qiet"))
    assert caught.value.hint == "did you mean 'quiet'?"


def test_what_an_engine_declares_is_what_plans_and_resumes_know_of_it(tmp_path: Path) -> None:
    text = "factors: {seed: [0]}\nset: {execution: {engine: pair, device: cuda, resources: {pretrain: {processes: 4}}}}"
    precision = "set: {pretrain.precision: bf16, execution"
    grid = load(tmp_path, text.replace("set: {execution", precision))
    shape = next(one for one in shapes_of(build_graph(grid)) if one.kind == "training")
    # Weights and gradients in bf16 on each process, of masters and moments a fourth.
    assert least_bytes(shape, 4000) == (2 + 2 + (4 + 8) / 4) * 4000
    made = Manifest("k", "train", {}, numerics={"engine": "pair", "world_size": 4})
    refuse_other_world(made, "torch", 4, "the state at step 3")
    for engine in ("pair", "torch", "fsdp"):
        with pytest.raises(NumericsError, match="of 4 processes under engine 'pair', and this job has 2") as refused:
            refuse_other_world(made, engine, 2, "the state at step 3")
        assert "engine fsdp or deepspeed:1 or deepspeed:2" in str(refused.value.hint)
    refuse_other_world(dataclasses.replace(made, numerics={"engine": "gone", "world_size": 4}), "torch", 2, "a state")


def test_an_engine_that_shares_what_nobody_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="weights, gradients, optimizer, not moments"):
        EngineKind("mine", "a:b", shares=("moments",))
