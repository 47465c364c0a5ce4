"""An optimizer of another package: named in a grid, typed, in the keys, resumed, forked and frozen with equal bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.node.preemption import Preempted
from jobs.train.optimizer import build_optimizer, export_state, plan_groups, take_step
from orchestrator.catalog.freezing import FREEZING
from orchestrator.catalog.optimizers import OPTIMIZERS, OptimizerKind
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.spec.cell import TrainSpec
from orchestrator.spec.identity import plain
from orchestrator.spec.rebuilding import build
from orchestrator.spec.work import Conditions, work_from_json, work_to_json
from tests.lion import LION, NAMES
from tests.packages import found, install
from tests.training import EXECUTION, TRAIN, prepare, run_chain, segments, state_bits, tensors
from tests.unit.test_train_exactness import fresh, stop_after

HEAD = "name: g\nbase: pretrain\nevaluate: [lm]\nfactors: {seed: [0]}\n"
WITH = dataclasses.replace(
    TRAIN, lr=1e-3, steps=12, optimizer="lion", optimizer_parameters=Parameters({"fast": 0.8}), weight_decay=0.1
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def lions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install(tmp_path / "site", "lions", LION, NAMES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with found(tmp_path / "site", "lions") as folder:
        yield folder


def load(folder: Path, text: str) -> Grid:
    path = folder / "g.yaml"
    path.write_text(text)
    return load_grid(str(path))


def trained(folder: Path, text: str) -> TrainSpec:
    train = load(folder, HEAD + text).cells[0].cell.pretrain
    assert train is not None
    return train


def problems(folder: Path, text: str) -> str:
    with pytest.raises(GridError) as caught:
        load(folder, HEAD + text)
    return str(caught.value)


@pytest.mark.usefixtures("lions")
def test_a_grid_names_it_and_types_its_parameters(tmp_path: Path) -> None:
    train = trained(tmp_path, "set: {pretrain: {optimizer: lion, optimizer_parameters: {fast: 0, slow: 0.99}}}\n")
    assert train.optimizer == "lion"
    assert dict(train.optimizer_parameters) == {"fast": 0.0}, "typed, without defaults"
    assert type(train.optimizer_parameters["fast"]) is float


@pytest.mark.usefixtures("lions")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{optimizer: lionn}", r"must be one of 'adamw', .*'lion'.*not 'lionn' .*g.yaml:5\).*did you mean 'lion'"),
        ("{optimizer: lion, optimizer_parameters: {fats: 1}}", r"'lion' has no parameter 'fats'.*did you mean 'fast'"),
        ("{optimizer: lion, optimizer_parameters: {fast: x}}", r"fast must be a number, not 'x'"),
        ("{optimizer: lion, optimizer_parameters: {nesterov: 1}}", r"nesterov must be true or false"),
        ("{optimizer: lion, optimizer_parameters: {fast: 1.0}}", r"optimizer 'lion': fast 1.0 is above slow 0.99"),
        ("{optimizer_parameters: {fast: 1.0}}", r"optimizer 'adamw' has no parameter 'fast'.*remove it"),
        ("{optimizer_parameters: 3}", r"must be a mapping of parameters, not 3"),
    ],
)
def test_what_is_wrong_with_it_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    import re

    found = problems(tmp_path, f"set:\n  pretrain: {text}\n".replace("set:\n  ", "set: {").rstrip() + "}\n")
    assert re.search(said, found, re.DOTALL), found
    assert "g.yaml:5" in found


@pytest.mark.usefixtures("lions")
def test_its_parameters_are_factors(tmp_path: Path) -> None:
    text = "factors: {optimizer: [lion], optimizer_parameters.fast: [0.8, 0.9], seed: [0]}\n"
    cells = load(tmp_path, "name: g\nbase: pretrain\nevaluate: [lm]\n" + text).cells
    found = [dict(cell.cell.pretrain.optimizer_parameters) for cell in cells if cell.cell.pretrain]
    assert found == [{"fast": 0.8}, {}]
    assert len({cell.id for cell in cells}) == 2
    assert [cell.factors["optimizer_parameters.fast"] for cell in cells] == [0.8, 0.9]


@pytest.mark.usefixtures("lions")
def test_fields_that_it_does_not_read_are_no_factors(tmp_path: Path) -> None:
    text = "factors: {optimizer: [lion], eps: [1e-8, 1e-6], seed: [0]}\n"
    with pytest.raises(GridError, match="the optimizer does not use it"):
        load(tmp_path, "name: g\nbase: pretrain\nevaluate: [lm]\n" + text)


@pytest.mark.usefixtures("lions")
def test_one_that_needs_whole_parameters_is_refused_where_they_are_cut(tmp_path: Path) -> None:
    text = "set: {pretrain.optimizer: whole, execution: {engine: fsdp, resources: {pretrain: {processes: 2}}}}\n"
    assert "optimizer 'whole' updates whole parameters, and engine 'fsdp' cuts them" in problems(tmp_path, text)


def conditions(train: TrainSpec) -> Conditions:
    return Conditions("pretrain", train, "t", 0)


@pytest.mark.usefixtures("lions")
def test_its_package_and_version_are_in_the_key_and_ours_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (conditions(dataclasses.replace(TRAIN, optimizer=name)).digest() for name in ("adamw", "lion"))
    assert ours == conditions(TRAIN).digest()
    assert theirs != ours
    assert OPTIMIZERS.identity("lion") == "lions:3"
    provided = OPTIMIZERS.outside["lion"]
    monkeypatch.setitem(
        OPTIMIZERS.outside,
        "lion",
        dataclasses.replace(provided, declaration=dataclasses.replace(provided.declaration, version=4)),
    )
    assert conditions(dataclasses.replace(TRAIN, optimizer="lion")).digest() != theirs


def test_parameters_survive_the_way_to_a_node() -> None:
    (work,) = segments([("", 0, 12)], WITH)
    again = work_from_json(work_to_json(work))
    assert again == work
    assert build(TrainSpec, plain(WITH)).optimizer_parameters == {"fast": 0.8}


@pytest.mark.usefixtures("lions")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_forked_and_frozen_equal_one_that_never_stopped(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = segments([("", 0, 4), ("router", 4, 8), ("", 8, 12)], dataclasses.replace(WITH, precision=precision))
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    run_chain(straight, works)
    for attempt, work in enumerate(works):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Preempted):
                run_chain(cut, [work], f"a-{attempt}")
        run_chain(cut, [work], f"b-{attempt}")
    assert state_bits(cut, works[-1].key()) == state_bits(straight, works[-1].key())
    before, frozen, after = (tensors(straight, work.key(), "optimizer") for work in works)
    router = [name for name in before if ".router." in name and name.endswith((".momentum", ".taken"))]
    assert router
    for name in router:
        assert torch.equal(before[name], frozen[name]), "a frozen group is not touched"
        assert not torch.equal(frozen[name], after[name])
    assert {name.rpartition(".")[2] for name in before} == {"momentum", "taken"} | (
        {"master"} if precision == "bf16" else set()
    )


@pytest.mark.usefixtures("lions")
def test_a_node_process_finds_it_by_its_path(tmp_path: Path) -> None:
    from tests.training import start, submit

    (work,) = segments([("", 0, 4)], dataclasses.replace(WITH, steps=4))
    store = fresh(tmp_path, "store")
    process = start(submit(store, [work], execution=EXECUTION))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    taken = [value for name, value in tensors(store, work.key(), "optimizer").items() if name.endswith(".taken")]
    assert taken
    assert set(map(float, taken)) == {4.0}


@pytest.mark.usefixtures("lions")
def test_state_that_is_not_declared_and_code_that_is_not_there_are_refused(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    groups = plan_groups([("weight", weight, "other")])
    optimizer = build_optimizer(WITH, groups, {"weight": weight})
    take_step(optimizer)
    for kind in (
        OptimizerKind("lion", "x:y", slots=("momentum",)),
        OptimizerKind("lion", "x:y", slots=("momentum", "taken")),
    ):
        with pytest.raises(MoegridError, match="optimizer 'lion' keeps 'taken'"):
            export_state(kind, optimizer, {id(weight): "weight"})
    with pytest.raises(MoegridError, match=r"the code of optimizer 'gone' of lions 1.2 cannot be imported"):
        build_optimizer(dataclasses.replace(TRAIN, optimizer="gone"), groups, {"weight": weight})
    with pytest.raises(MoegridError, match="declares the states master"):
        OptimizerKind("x", "x:y", slots=("master",))


def test_the_plan_of_ours_looks_at_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    assert trained(tmp_path, "").optimizer == "adamw"
    assert prepare(str(tmp_path / "store"))


def test_a_file_beside_the_grid_declares_one_as_well(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        LION[: LION.index("GONE =")].replace('"lions:', '"./mine.py:').replace('"lion"', '"my_lion"')
    )
    text = "plugins: [./mine.py]\nset: {pretrain: {optimizer: my_lion, optimizer_parameters: {fast: 0.8}}}\n"
    try:
        train = trained(tmp_path, text)
        weight = torch.nn.Parameter(torch.ones(4, 4))
        built = build_optimizer(train, plan_groups([("weight", weight, "other")]), {"weight": weight})
        assert type(built).__name__ == "Lion"
        assert str(OPTIMIZERS.identity("my_lion")).startswith("sha256:")
    finally:
        for name in ("my_lion", "whole"):
            OPTIMIZERS.outside.pop(name, None)
        FREEZING.outside.pop("lower", None)
