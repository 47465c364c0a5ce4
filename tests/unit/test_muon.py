"""Muon: torch's own update of each matrix, AdamW's of the rest; frozen, resumed and forked with equal bits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.node.preemption import Preempted
from jobs.train.muon import MuonWithAdamW, orthogonal
from jobs.train.optimizer import build_optimizer, plan_groups, set_learning_rates
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.spec.cell import TrainSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.work import Conditions
from tests.seeing import SEES
from tests.training import MODEL, TRAIN, run_chain, segments, state_bits, tensors
from tests.unit.test_train_exactness import fresh, stop_after

WITH = dataclasses.replace(TRAIN, optimizer="muon", weight_decay=0.1, lr=3e-3, steps=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def test_matrices_become_orthogonal_each_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 2, 24, 16, generator=generator)
    made = orthogonal(stack, 5)
    for outer in range(3):
        for inner in range(2):
            values = torch.linalg.svdvals(made[outer, inner].float())
            assert 0.5 < float(values.min()) <= float(values.max()) < 1.5
            u, _, v = torch.linalg.svd(stack[outer, inner], full_matrices=False)
            assert float((made[outer, inner].float() * (u @ v)).sum()) > 0.8 * 16, "in the directions of the matrix"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, latent_size=16)), ".mlp."),
        (SEES, "vision.encoder."),
    ],
)
def test_whatever_is_a_matrix_and_no_embedding_is_orthogonalised(spec: ModelSpec, part: str) -> None:
    """Latents of experts are; positions of a picture are not, nor is the convolution that makes its patches."""
    model = build_model(spec, 64)
    optimizer = build_optimizer(WITH, plan_groups(parameter_roles(model)), dict(model.named_parameters()))
    assert isinstance(optimizer, MuonWithAdamW)
    matrices = {n: p for n, p in model.named_parameters() if part in n and p.ndim in (2, 3) and not n.endswith("_bias")}
    rest = {n for n, p in matrices.items() if id(p) not in optimizer._stacked}
    assert rest == {n for n in matrices if ".router." in n or n.endswith(".positions")}
    assert rest < matrices.keys()


@pytest.mark.parametrize(("adjust", "theirs"), [("rms", "match_rms_adamw"), ("original", "original")])
def test_steps_are_those_of_torch_on_each_matrix_and_adamw_on_the_rest(adjust: str, theirs: str) -> None:
    """Both round in bf16 inside the iteration, in another order: the updates agree to its digits."""
    train = dataclasses.replace(WITH, optimizer_parameters=Parameters({"adjust": adjust}))
    model = build_model(MODEL, 64)
    roles = list(parameter_roles(model))
    generator = torch.Generator().manual_seed(1)
    for _, parameter, _ in roles:
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    start = {name: parameter.detach().clone() for name, parameter, _ in roles}
    optimizer = build_optimizer(train, plan_groups(roles), {name: p for name, p, _ in roles})
    set_learning_rates(optimizer, 1e-2, 1e-2)
    gradients = [{name: torch.randn(p.shape, generator=generator) for name, p, _ in roles} for _ in range(3)]
    for step in gradients:
        for name, parameter, _ in roles:
            parameter.grad = step[name]
        optimizer.step()
    pieces: dict[str, list[tuple[int, slice]]] = {}
    for name, parameter, role in roles:
        matrix = parameter.ndim == 3 or (parameter.ndim == 2 and role == "attention")
        halves = [slice(0, 32), slice(32, 64)] if name.endswith("experts.up") else [slice(None)]
        pieces[name] = [(e, half) for e in range(len(parameter)) for half in halves] if parameter.ndim == 3 else []
        own = (
            [start[name].clone()] if parameter.ndim < 3 else [start[name][e][half].clone() for e, half in pieces[name]]
        )
        own = [torch.nn.Parameter(one) for one in own]
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        alone: torch.optim.Optimizer
        if matrix:
            alone = torch.optim.Muon(own, lr=1e-2, weight_decay=decay, momentum=0.95, adjust_lr_fn=theirs)
        else:
            alone = torch.optim.AdamW(own, lr=1e-2, betas=train.betas, eps=train.eps, weight_decay=decay, fused=True)
        for step in gradients:
            parts = [step[name]] if parameter.ndim < 3 else [step[name][e][half] for e, half in pieces[name]]
            for one, part in zip(own, parts, strict=True):
                one.grad = part.clone()
            alone.step()
        found = [parameter] if parameter.ndim < 3 else [parameter[e][half] for e, half in pieces[name]]
        for one, mine in zip(own, found, strict=True):
            if matrix:
                moved = (one - mine).norm() / one.norm()
                assert float(moved.detach()) < 5e-3, name
            else:
                assert torch.equal(one, mine), name
    assert isinstance(optimizer, MuonWithAdamW)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_forked_and_resumed_runs_have_equal_bits(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dataclasses.replace(WITH, precision=precision)
    works = segments([("", 0, 3), ("expert", 3, 6), ("", 6, 8)], train)
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    run_chain(straight, works)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Preempted):
            run_chain(cut, works)
    run_chain(cut, works[1:], "b")
    assert state_bits(cut, works[2].key()) == state_bits(straight, works[2].key())
    before, frozen = (tensors(straight, work.key(), "weights") for work in works[:2])
    states = [tensors(straight, work.key(), "optimizer") for work in works]
    expert, query = (next(name for name in before if name.endswith(end)) for end in ("experts.up", "q_proj.weight"))
    assert torch.equal(before[expert], frozen[expert])
    assert not torch.equal(before[query], frozen[query])
    assert torch.equal(states[0][f"{expert}.momentum_buffer"], states[1][f"{expert}.momentum_buffer"])
    assert not torch.equal(states[1][f"{expert}.momentum_buffer"], states[2][f"{expert}.momentum_buffer"])
    kept = {name.rpartition(".")[2] for name in states[0] if name.startswith(f"{query}.")} - {"master"}
    assert kept == {"momentum_buffer"}, "a matrix has one moment, not two"


def test_it_learns(tmp_path: Path) -> None:
    from tests.unit.test_train_exactness import series

    store = fresh(tmp_path, "store")
    (work,) = segments([("", 0, 40)], dataclasses.replace(WITH, steps=40, expert_dropout=0.0, lr=1e-2))
    run_chain(store, [work])
    losses = [row["train/lm_loss"] for row in series(store, work)]
    assert losses[-1] < 0.6 * losses[0]


def test_its_parameters_are_in_the_key_and_adamw_keeps_its_own() -> None:
    def digest(train: TrainSpec) -> str:
        return Conditions("pretrain", train, "t", 0).digest()

    more = dataclasses.replace(WITH, optimizer_parameters=Parameters({"momentum": 0.9}))
    assert len({digest(TRAIN), digest(WITH), digest(more)}) == 3
    assert digest(dataclasses.replace(TRAIN, optimizer="adamw")) == digest(TRAIN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{optimizer: moun}", "must be one of 'adamw', 'muon'.*did you mean 'muon'"),
        ("{optimizer: muon, optimizer_parameters: {momentum: 1}}", "momentum must be at least 0 and below 1, not 1"),
        ("{optimizer: muon, optimizer_parameters: {adjust: rsm}}", "adjust must be rms or original, not 'rsm'"),
        ("{optimizer: muon, optimizer_parameters: {adamw_lr_ratio: 0}}", "adamw_lr_ratio must be above 0"),
        (
            "{optimizer: muon}\n  execution: {engine: 'deepspeed:2', resources: {pretrain: {processes: 2}}}",
            "engine 'deepspeed:2' cuts them.*use engine: torch or fsdp",
        ),
    ],
)
def test_a_wrong_value_is_told_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(f"name: g\nbase: pretrain\nevaluate: [lm]\nfactors: {{seed: [0]}}\nset:\n  pretrain: {text}\n")
    with pytest.raises(GridError) as caught:
        load_grid(str(path))
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
