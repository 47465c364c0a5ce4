"""A score, a selection, an expert form and a gate of another package: in YAML and keys, counted, built, trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.moe import build_block
from jobs.moe.interventions import pruned
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError, MoegridError
from orchestrator.plan.cost import parameters
from orchestrator.spec import versions
from orchestrator.spec.model import Model, ModelSpec, MoESpec
from orchestrator.spec.providers import uses_of
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import InitWork, work_from_json, work_to_json
from tests.packages import found, install
from tests.unit.conftest import Load

MODULE = """
from dataclasses import dataclass

import torch

from orchestrator.catalog.experts import ExpertKind
from orchestrator.catalog.gates import GateKind
from orchestrator.catalog.scores import ScoreKind
from orchestrator.catalog.selections import SelectionKind


def softplus(logits):
    return torch.nn.functional.softplus(logits)


def squared(hidden):
    return torch.relu(hidden).square()


def top_p(values, k):
    best, ids = values.topk(k, dim=-1)
    before = best.cumsum(-1) - best
    return torch.where(before < 0.5, ids, -1)


TOP_P = SelectionKind("top_p", "outside_parts:top_p", fixed=False)
SOFTPLUS = ScoreKind("softplus", "outside_parts:softplus")
REGLU2 = ExpertKind("reglu2", "outside_parts:squared", gated=True)
RELU2 = ExpertKind("relu2", "outside_parts:squared", bias=True)


@dataclass(frozen=True)
class Own:
    by: float = 2.0

    def __post_init__(self):
        if self.by <= 0:
            raise ValueError("by is not above 0")


@dataclass(frozen=True)
class Narrow:
    width: int = 3


def warm(logits, own):
    return torch.softmax(logits / own.by, dim=-1)


def share(values, k, own):
    best, ids = values.topk(k, dim=-1)
    return torch.where(best.cumsum(-1) - best < own.by, ids, -1)


def power(hidden, own):
    return torch.relu(hidden) ** own.by


class Bottleneck(torch.nn.Module):
    def __init__(self, ids, hidden_size, own):
        super().__init__()
        self.down = torch.nn.Parameter(torch.empty(own.width, hidden_size))
        self.up = torch.nn.Parameter(torch.empty(ids, own.width))

    def reset_parameters(self, std):
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=std)

    def forward(self, x):
        return torch.tanh(x @ self.down.t()) @ self.up.t()


WARM = ScoreKind("warm", "outside_parts:warm", distribution=True, parameters=Own)
SHARE = SelectionKind("share", "outside_parts:share", fixed=False, parameters=Own)
POWER = ExpertKind("power", "outside_parts:power", bias=True, parameters=Own)
NARROW = GateKind(
    "narrow",
    "outside_parts:Bottleneck",
    parameters=Narrow,
    parameter_count=lambda ids, hidden_size, own: own.width * (ids + hidden_size),
)
"""
ENTRIES = {
    "selections": {"top_p": "outside_parts:TOP_P", "share": "outside_parts:SHARE"},
    "scores": {"softplus": "outside_parts:SOFTPLUS", "warm": "outside_parts:WARM"},
    "experts": {"reglu2": "outside_parts:REGLU2", "relu2": "outside_parts:RELU2", "power": "outside_parts:POWER"},
    "gates": {"narrow": "outside_parts:NARROW"},
}
SIZES = {"top_k": 2, "num_experts": 4, "expert_width": 16}


@pytest.fixture(autouse=True)
def package(tmp_path: Path) -> Iterator[None]:
    install(tmp_path / "site", "outside_parts", MODULE, ENTRIES)
    with found(tmp_path / "site", "outside_parts"):
        yield


def model_of(preset: str = "smoe", **fields: str) -> Model:
    moe = MoESpec(preset=preset, top_k=2, num_experts=4, expert_width=16, shared_experts=1, **fields)  # type: ignore[arg-type]
    return resolve_model(ModelSpec(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe))


def test_a_grid_names_them_and_a_wrong_name_is_told(load: Load) -> None:
    grid = load("factors: {score: [softmax, softplus], expert: [swiglu, reglu2]}\n")
    assert [(i.cell.model.moe.score, i.cell.model.moe.expert) for i in grid.cells[1:3]] == [
        ("softmax", "reglu2"),
        ("softplus", "swiglu"),
    ]
    with pytest.raises(GridError, match="did you mean 'reglu2'"):
        load("factors: {expert: [reglu]}\n")
    with pytest.raises(GridError, match="score 'softplus' and preset 'moepp' do not belong together"):
        load("factors: {seed: [0]}\nset: {model.moe.preset: moepp, model.moe.score: softplus}\n")


@pytest.mark.parametrize("preset", ["smoe", "dense"])
@pytest.mark.parametrize("expert", ["reglu2", "relu2"])
def test_an_expert_form_is_counted_and_trains(preset: str, expert: str) -> None:
    spec = model_of(preset, expert=expert)
    model = build_model(spec, 64)
    assert parameters(spec, 64).total == sum(parameter.numel() for parameter in model.parameters())
    loss = model(torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_expert_computes_what_it_says_on_every_path() -> None:
    block = build_block({"preset": "smoe", "hidden_size": 16, "expert": "reglu2", **SIZES}, init_std=0.3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[1], [0], [3], [1], [2]]), torch.ones(5, 1)
    named = block.named_weights()
    by_hand = torch.stack(
        [
            F.linear(
                F.relu(F.linear(row, named["experts.gate"][e])).square() * F.linear(row, named["experts.up"][e]),
                named["experts.down"][e],
            )
            for row, e in zip(x, ids[:, 0], strict=True)
        ]
    )
    for path in ("", "loop", "grouped"):
        torch.testing.assert_close(block.experts(x, ids, weights, path), by_hand, atol=1e-5, rtol=1e-5)


def test_a_score_selects_and_weighs() -> None:
    block = build_block({"preset": "smoe", "hidden_size": 16, "score": "softplus", **SIZES})
    _, routing = block(torch.randn(1, 6, 16))
    torch.testing.assert_close(routing.scores, F.softplus(routing.logits))
    assert not routing.softmax
    best = routing.scores.gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, best / best.sum(-1, keepdim=True))
    with pruned(block, {0: 1}):
        assert not bool((block(torch.randn(1, 6, 16))[1].indices == 1).any())
    with pytest.raises(MoegridError, match="softmax over experts"):
        build_block({"preset": "expert_choice", "hidden_size": 16, "score": "softplus", **SIZES})


def test_a_selection_may_leave_slots_empty(load: Load) -> None:
    fields = {"preset": "smoe", "hidden_size": 16, "selection": "top_p", "num_experts": 4, "top_k": 3}
    torch.manual_seed(0)
    block = build_block({**fields, "router_init_std": 0.3})
    _, routing = block(torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)))
    lengths = (routing.indices >= 0).sum(-1)
    assert set(lengths.tolist()) <= {1, 2, 3}
    assert len(set(lengths.tolist())) > 1
    assert bool((routing.weights[routing.indices < 0] == 0).all())
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(64))
    assert int(routing.counts.sum()) == int(lengths.sum())
    grid = load("factors: {selection: [top_k, top_p]}\n")
    assert grid.cells[0].id == load("factors: {seed: [0]}\n").cells[0].id
    with pytest.raises(GridError, match="applies to choice 'token' only"):
        load("factors: {seed: [0]}\nset: {model.moe: {preset: expert_choice, selection: top_p}}\n")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"score": "softplus"}, "scores"),
        ({"expert": "relu2"}, "experts"),
        ({"selection": "top_p"}, "selections"),
        ({"gate": "narrow"}, "gates"),
    ],
)
def test_keys_and_nodes_know_whose_it_is(fields: dict[str, str], word: str) -> None:
    work = InitWork(model_of(**fields), "tokenizer")
    again = work_from_json(json.loads(json.dumps(work_to_json(work))))
    assert again.key() == work.key() != InitWork(model_of(), "tokenizer").key()
    assert list(versions.raised(work.parts()).values()) == ["outside_parts:1"]
    (use,) = uses_of(work)
    assert str(use) == f"outside_parts 1.2 ({word}: {next(iter(fields.values()))})"


@pytest.mark.parametrize("part", ["score", "selection", "expert", "gate"])
def test_a_parts_parameters_are_typed_hashed_off_their_defaults_and_told_where_they_are_wrong(
    part: str, load: Load
) -> None:
    name, word, default = {
        "score": ("warm", "by", 2.0),
        "selection": ("share", "by", 2.0),
        "expert": ("power", "by", 2.0),
        "gate": ("narrow", "width", 3),
    }[part]
    grid = load(
        f"factors:\n  {part}: [{name}]\n  {part}_parameters.{word}: [{default:g}, 1]\n"
        f"  seed: [0]\nset: {{model.moe.preset: smoe}}\n"
    )
    plain, other = (item.cell.model.moe for item in grid.cells)
    assert not getattr(plain, f"{part}_parameters"), "a value that is the default is left out"
    ((key, value),) = getattr(other, f"{part}_parameters").items()
    assert (key, value, type(value)) == (word, 1, type(default))
    named = load(f"factors: {{{part}: [{name}]}}\n").cells[0].cell.model.moe
    assert plain == dataclasses.replace(named, preset="smoe", renormalise=True)
    assert len({InitWork(resolve_model(ModelSpec(moe=moe)), "tokenizer").key() for moe in (plain, other)}) == 2
    with pytest.raises(GridError, match=rf"{name}' has no parameter 'bye'") as wrong:
        load(f"factors: {{seed: [0]}}\nset:\n  model.moe:\n    {part}: {name}\n    {part}_parameters:\n      bye: 1\n")
    assert ".yaml:7" in str(wrong.value)
    if word == "by":
        with pytest.raises(GridError, match="by is not above 0"):
            load(f"factors: {{{part}: [{name}]}}\nset: {{model.moe.{part}_parameters: {{by: -1}}}}\n")


def test_parameters_reach_the_code_of_a_score_a_selection_and_an_expert() -> None:
    x = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(0))
    fields = {"preset": "smoe", "hidden_size": 16, **SIZES, "router_init_std": 0.5}
    torch.manual_seed(0)
    block = build_block({**fields, "score": "warm", "score_parameters": {"by": 4.0}})
    routing = block(x)[1]
    torch.testing.assert_close(routing.scores, torch.softmax(routing.logits / 4, dim=-1))
    for share, least in ((1e-6, 1), (1.0, 2)):
        block = build_block({**fields, "selection": "share", "selection_parameters": {"by": share}})
        assert ((block(x)[1].indices >= 0).sum(-1) == least).all()
    block = build_block({**fields, "expert": "power", "expert_parameters": {"by": 3.0}}, init_std=0.5)
    named = block.named_weights()
    hidden = F.relu(F.linear(x[0], named["experts.up"][2], named["experts.up_bias"][2])) ** 3
    by_hand = F.linear(hidden, named["experts.down"][2], named["experts.down_bias"][2])
    torch.testing.assert_close(block.experts(x[0], torch.full((32, 1), 2), torch.ones(32, 1)), by_hand)


@pytest.mark.parametrize("preset", ["smoe", "tc_moe"])
def test_a_gate_stands_in_for_the_routers_matrix(preset: str, load: Load) -> None:
    moe = MoESpec(preset=preset, gate="narrow", gate_parameters=Parameters({"width": 5}), **SIZES)  # type: ignore[arg-type]
    spec = resolve_model(ModelSpec(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe))
    torch.manual_seed(0)
    model = build_model(spec, 64)
    assert parameters(spec, 64).total == sum(parameter.numel() for parameter in model.parameters())
    model(torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    roles = {name: role for name, _, role in parameter_roles(model) if ".router." in name}
    assert len(roles) == 4
    assert set(roles.values()) == {"router"}
    block = model.moe_blocks[0]
    x = torch.randn(1, 4, 16)
    gate = block.router.gate
    torch.testing.assert_close(block(x)[1].logits, torch.tanh(x[0] @ gate.down.t()) @ gate.up.t())
    with pytest.raises(GridError, match="gate 'narrow' with preset 'xmoe': it has a gate of its own"):
        load("factors: {seed: [0]}\nset: {model.moe: {preset: xmoe, gate: narrow}}\n")
    with pytest.raises(GridError, match="gate does not apply: preset 'dense' has no router"):
        load("factors: {seed: [0]}\nset: {model.moe: {preset: dense, gate: narrow}}\n")
