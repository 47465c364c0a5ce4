"""A loss of another package: named in YAML, typed by its own parameters, in the keys of what trains with it alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.moe.balance import balance_loss
from jobs.moe.routing import Routing
from jobs.moe.selection import count
from orchestrator.catalog.losses import LOSSES
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import Grid
from orchestrator.spec.cell import BalanceSpec, DataSpec, TrainSpec
from orchestrator.spec.identity import plain
from orchestrator.spec.rebuilding import build
from orchestrator.spec.work import Conditions
from tests.packages import found, install
from tests.unit.conftest import Load, Told

MODULE = """
from dataclasses import dataclass

from orchestrator.catalog.losses import LossKind


@dataclass(frozen=True)
class Hinge:
    margin: float = 1.0
    power: int = 2

    def __post_init__(self):
        if self.margin < 0:
            raise ValueError("margin is below 0")


def hinge(routing, parameters):
    over = (routing.scores[routing.mask].max(-1).values - parameters.margin).clamp_min(0)
    return (over**parameters.power).mean()


def mean_logit(routing):
    return routing.logits.mean()


def many(routing):
    return routing.logits


HINGE = LossKind("hinge", "outside_losses:hinge", Hinge)
PLAIN = LossKind("mean_logit", "outside_losses:mean_logit", version=3)
MANY = LossKind("many", "outside_losses:many")
ABSENT = LossKind("absent", "outside_losses:nobody")
"""
ENTRIES = {
    "losses": {
        "hinge": "outside_losses:HINGE",
        "mean_logit": "outside_losses:PLAIN",
        "many": "outside_losses:MANY",
        "absent": "outside_losses:ABSENT",
        "broken": "outside_losses:NOTHING",
    }
}


@pytest.fixture(autouse=True)
def package(tmp_path: Path) -> Iterator[None]:
    install(tmp_path / "site", "outside_losses", MODULE, ENTRIES)
    with found(tmp_path / "site", "outside_losses"):
        yield


def losses(grid: Grid) -> list[dict[str, dict[str, object]]]:
    cells = [item.cell.finetune for item in grid.cells]
    return [{name: dict(use) for name, use in train.balance.losses.items()} for train in cells if train is not None]


def record(logits: torch.Tensor) -> Routing:
    """Return what a softmax router with two slots decides."""
    scores = torch.softmax(logits, dim=-1)
    weights, indices = scores.topk(2, dim=-1)
    mask = torch.ones(len(logits), dtype=torch.bool)
    return Routing(logits, scores, indices, weights, mask, count(indices, logits.shape[1]), 1, 2, logits.shape[1])


def digest(**uses: dict[str, float | int]) -> str:
    train = TrainSpec(DataSpec(source=""), freeze="", balance=BalanceSpec(losses=uses))
    return Conditions("pretrain", train, "tokens", 0).digest()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{hinge: 0.01}", {"hinge": {"coef": 0.01}}),
        ("{hinge: {coef: 1, margin: 2}}", {"hinge": {"coef": 1.0, "margin": 2.0}}),
        ("{hinge: {coef: 0.01, margin: 1, power: 2}}", {"hinge": {"coef": 0.01}}),
        ("{hinge: {coef: 0.0, margin: 3}, mean_logit: 0.1}", {"mean_logit": {"coef": 0.1}}),
        ("{hinge: false}", {}),
    ],
)
def test_parameters_have_the_types_of_the_loss_and_no_defaults(load: Load, written: str, read: object) -> None:
    assert losses(load(f"factors: {{seed: [0]}}\nset: {{finetune.balance.losses: {written}}}\n")) == [read]


@pytest.mark.parametrize(
    ("written", "message", "hint"),
    [
        ("{hinj: 0.01}", "finetune.balance.losses.hinj loss 'hinj' is unknown", "did you mean 'hinge'?"),
        (
            "{hinge: {coef: 1, margn: 2}}",
            "losses.hinge.margn is no parameter of loss 'hinge'",
            "did you mean 'margin'?",
        ),
        ("{hinge: {coef: 1, power: 2.5}}", "losses.hinge.power must be a whole number, not 2.5", ""),
        ("{hinge: {margin: 2}}", "losses.hinge.coef is required", ""),
        ("{hinge: -1}", "losses.hinge.coef must be at least 0", ""),
        ("{hinge: {coef: 1, margin: -2}}", "loss 'hinge': margin is below 0", ""),
        ("{entropy: 0.1}", "loss 'entropy' is moegrid's own", "set balance.entropy_coef"),
        ("{broken: 0.1}", "loss 'broken' cannot be loaded from outside_losses 1.2", "uninstall it"),
        ("[hinge]", "must be a mapping of losses", "{coef: 0.01}"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(told: Told, written: str, message: str, hint: str) -> None:
    problem = told(f"factors: {{seed: [0]}}\nset:\n  finetune.balance.losses:\n    {written}\n")
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith(("grid.yaml:4", "grid.yaml:5"))


def test_a_loss_and_its_parameter_are_factors(load: Load) -> None:
    grid = load("factors: {losses.hinge: [0, 0.5], seed: [0]}\n")
    assert losses(grid) == [{}, {"hinge": {"coef": 0.5}}]
    plain = load("factors: {seed: [0]}\n")
    assert grid.cells[0].id == plain.cells[0].id, "a coefficient of 0 is no loss"
    grid = load("factors: {finetune.balance.losses.hinge.margin: [1, 3]}\nset: {finetune.balance.losses.hinge: 0.5}\n")
    assert losses(grid) == [{"hinge": {"coef": 0.5}}, {"hinge": {"coef": 0.5, "margin": 3.0}}]
    with pytest.raises(GridError, match="the loss hinge is off"):
        load("factors: {losses.hinge.margin: [1, 3]}\n")
    with pytest.raises(GridError, match=r"loss 'hinge' has no parameter 'margi'"):
        load("factors: {losses.hinge.margi: [1, 3]}\n")
    with pytest.raises(GridError, match="cannot be a factor as a whole"):
        load("factors: {losses: [1, 3]}\n")


def test_the_keys_hold_package_version_and_parameters() -> None:
    none, hinge = digest(), digest(hinge={"coef": 0.5})
    assert len({none, hinge, digest(hinge={"coef": 0.5, "margin": 2.0}), digest(hinge={"coef": 1.0})}) == 4
    provided = LOSSES.outside["hinge"]
    object.__setattr__(provided.declaration, "version", 2)
    assert digest(hinge={"coef": 0.5}) != hinge
    assert digest() == none


def test_a_node_reads_the_same_conditions() -> None:
    train = TrainSpec(DataSpec(source=""), freeze="", balance=BalanceSpec(losses={"hinge": {"coef": 1.0, "power": 3}}))
    conditions = Conditions("pretrain", train, "tokens", 0)
    again = build(Conditions, plain(conditions))
    assert again == conditions
    assert again.digest() == conditions.digest()


def test_it_is_added_with_its_coefficient_as_a_mean_over_layers_and_has_gradients() -> None:
    logits = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1)]
    off = BalanceSpec(aux_coef=0.0, z_coef=0.0)
    total, parts = balance_loss([record(one) for one in logits], off)
    assert not total.requires_grad
    assert "loss_hinge" not in parts
    on = BalanceSpec(aux_coef=0.0, z_coef=0.0, losses={"hinge": {"coef": 2.0, "margin": 0.25}})
    total, parts = balance_loss([record(one) for one in logits], on)
    by_hand = [(torch.softmax(one, -1).max(-1).values - 0.25).clamp_min(0).square().mean() for one in logits]
    assert parts["loss_hinge"].item() == pytest.approx(sum(by_hand).item() / 2)
    assert total.item() == pytest.approx(2 * parts["loss_hinge"].item())
    total.backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in logits)


@pytest.mark.parametrize(("name", "said"), [("many", r"returns a tensor \[6, 4\]"), ("absent", "cannot be imported")])
def test_code_that_is_no_loss_is_named(name: str, said: str) -> None:
    with pytest.raises(MoegridError, match=said):
        balance_loss([record(torch.randn(6, 4))], BalanceSpec(losses={name: {"coef": 1.0}}))


def test_a_loss_without_parameters_takes_the_routing_alone() -> None:
    _, parts = balance_loss([record(torch.ones(6, 4))], BalanceSpec(losses={"mean_logit": {"coef": 1.0}}))
    assert parts["loss_mean_logit"].item() == 1.0
