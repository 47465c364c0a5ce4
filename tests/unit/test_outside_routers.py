"""A router of another package: named in YAML, typed by its own parameters, counted, built; no other key changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.models.building import build_model
from jobs.moe import build_block
from orchestrator import cli
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import Grid
from orchestrator.plan.cost import parameters
from orchestrator.spec.model import Model, ModelSpec, MoESpec
from orchestrator.spec.resolve import is_causal, resolve_model
from orchestrator.spec.work import InitWork, work_from_json, work_to_json
from tests.golden_keys import models, named
from tests.outside_router import DECLARED, noisy_installed
from tests.unit.conftest import Load, Told

NOISE = "model.moe.parameters.noise"
SEED = "factors: {seed: [0]}\n"


@pytest.fixture(autouse=True)
def site(tmp_path: Path) -> Iterator[Path]:
    with noisy_installed(tmp_path / "site") as folder:
        yield folder


def model_of(preset: str, **fields: object) -> Model:
    moe = MoESpec(preset=preset, top_k=2, num_experts=4, expert_width=16, parameters=Parameters(fields))
    return resolve_model(ModelSpec(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe))


def key(model: Model) -> str:
    return InitWork(model, "tokenizer").key()


def settings(grid: Grid) -> list[tuple[str, dict[str, object]]]:
    return [(item.cell.model.moe.preset, dict(item.cell.model.moe.parameters)) for item in grid.cells]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{}", {}),
        ("{noise: 1}", {}),
        ("{noise: 2, hidden: 4}", {"noise": 2.0}),
        ("{hidden: 8}", {"hidden": 8}),
    ],
)
def test_parameters_have_the_types_of_the_router_and_no_defaults(load: Load, written: str, read: object) -> None:
    text = f"{SEED}set: {{model.moe.preset: noisy, model.moe.parameters: {written}}}\n"
    assert settings(load(text)) == [("noisy", read)]


@pytest.mark.parametrize(
    ("preset", "written", "message", "hint"),
    [
        ("nosy", "{}", "must be one of 'dense', 'smoe'", "did you mean 'noisy'?"),
        ("noisy", "{nois: 2}", "preset 'noisy' has no parameter 'nois'", "did you mean 'noise'?"),
        ("noisy", "{noise: loud}", "noise must be a number, not 'loud'", ""),
        ("noisy", "{hidden: 2.5}", "hidden must be a whole number, not 2.5", ""),
        ("noisy", "{noise: -1}", "preset 'noisy': noise is below 0", "correct its parameters"),
        ("smoe", "{noise: 2}", "preset 'smoe' has no parameter 'noise'", "remove it"),
        ("noisy", "[1]", "must be a mapping of parameters", "write {NAME: value}"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(told: Told, preset: str, written: str, message: str, hint: str) -> None:
    problem = told(f"{SEED}set:\n  model.moe.preset: {preset}\n  model.moe.parameters: {written}\n")
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where.endswith("grid.yaml:4" if preset == "nosy" else "grid.yaml:5")


@pytest.mark.parametrize(
    "text",
    [
        "factors: {preset: [smoe, noisy]}\nwith: {preset: {noisy: {model.moe.parameters.noise: [1]}}}\n",
        "factors: {model.moe.parameters.noise: [[[1]], 2]}\nset: {model.moe.preset: noisy}\n",
    ],
)
def test_a_list_where_a_number_belongs_is_told_wherever_it_stands(load: Load, text: str) -> None:
    with pytest.raises(GridError, match=r"noise must be a number, not \["):
        load(text)


def test_its_problems_are_told_before_anything_runs(load: Load) -> None:
    with pytest.raises(GridError, match="every token has noise of its own"):
        load(f"{SEED}set: {{model.moe.preset: noisy, model.moe.unit: word}}\n")
    with pytest.raises(GridError, match="it has a router of its own"):
        load(f"{SEED}set: {{model.moe.preset: noisy, model.moe.choice: expert}}\n")


def test_a_parameter_is_a_factor_where_the_preset_has_it(load: Load) -> None:
    grid = load(f"factors: {{preset: [smoe, noisy], {NOISE}: [1, 3]}}\nwhen: {{{NOISE}: {{preset: noisy}}}}\n")
    assert settings(grid) == [("smoe", {}), ("noisy", {}), ("noisy", {"noise": 3.0})]
    assert [item.factors.get(NOISE) for item in grid.cells] == [None, 1, 3]
    with pytest.raises(GridError, match="preset 'smoe' has no parameter 'noise'"):
        load(f"factors: {{preset: [smoe, noisy], {NOISE}: [1, 3]}}\n")
    set_with = load(f"factors: {{preset: [smoe, noisy]}}\nwith: {{preset: {{noisy: {{{NOISE}: 2}}}}}}\n")
    assert settings(set_with) == [("smoe", {}), ("noisy", {"noise": 2.0})]


def test_no_key_changes_when_a_kind_or_a_parameter_is_added(site: Path) -> None:
    before = {**named((name, key(model)) for name, model in models()), "noisy": key(model_of("noisy"))}
    three = key(model_of("noisy", noise=3.0))
    more = DECLARED.replace("    hidden: int = 4\n", "    hidden: int = 4\n    later: bool = False\n")
    more += 'OTHER = RouterKind("other")\n'
    assert more != DECLARED + 'OTHER = RouterKind("other")\n'
    with noisy_installed(site, more):
        after = {**named((name, key(model)) for name, model in models()), "noisy": key(model_of("noisy"))}
        assert after == before
        assert key(model_of("noisy", noise=3.0, later=False)) == three
        assert len({before["noisy"], three, key(model_of("noisy", later=True))}) == 3
    with noisy_installed(site, DECLARED.replace('    "noisy",\n', '    "noisy",\n    version=2,\n')):
        assert key(model_of("noisy")) != before["noisy"]


def test_a_node_reads_the_same_work() -> None:
    work = InitWork(model_of("noisy", noise=3, hidden=2), "tokenizer")
    again = work_from_json(json.loads(json.dumps(work_to_json(work))))
    assert again == work
    assert again.key() == work.key()


@pytest.mark.parametrize("preset", ["noisy", "fields"])
def test_its_model_has_as_many_parameters_as_the_plan_says_and_trains(preset: str) -> None:
    spec = model_of(preset)
    model = build_model(spec, 64)
    assert parameters(spec, 64).total == sum(parameter.numel() for parameter in model.parameters())
    out = model(torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert is_causal(spec.moe)


def test_its_parameters_reach_its_code() -> None:
    fields = {"preset": "noisy", "hidden_size": 16, "num_experts": 4, "parameters": {"noise": 2.5, "hidden": 3}}
    router: Any = build_block(fields).router
    assert dataclasses.asdict(router.settings) == {"noise": 2.5, "hidden": 3}
    assert tuple(router.down.shape) == (3, 16)
    with pytest.raises(MoegridError, match="cannot be built"):
        build_block({**fields, "parameters": {"noise": -2}})


def test_code_that_is_not_there_says_whose_it_is(site: Path) -> None:
    elsewhere = DECLARED.replace("outside_router_code:Noisy", "outside_router_code:Nobody")
    said = r"the code of preset 'noisy' of outside_router 1.2 cannot be imported"
    with noisy_installed(site, elsewhere), pytest.raises(MoegridError, match=said):
        build_block({"preset": "noisy", "hidden_size": 16})


def test_the_schema_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "noisy" in schema["$defs"]["values"]["properties"]["preset"]["enum"]
