"""Freeze rules of another package: words of a schedule that freeze by role or by name, proved to the bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from orchestrator.catalog.freezing import FREEZING, FreezeRule
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.work import TrainWork
from tests.packages import found, install
from tests.training import MODEL, TRAIN, run_chain, segments, state_bits, tensors
from tests.unit.test_train_exactness import fresh

RULES = """
from orchestrator.catalog.freezing import FreezeRule


def lower(name, role, model):
    return any(f".layers.{index}." in name for index in range(model.num_layers // 2))


TRUNK = FreezeRule("trunk", ("attention", "embedding"), version=2)
LOWER = FreezeRule("lower", ("router",), code="rules:lower")
GONE = FreezeRule("gone", code="rules:no_such")
"""
NAMES = {"freezing": {name: f"rules:{name.upper()}" for name in ("trunk", "lower", "gone")}}
WORDS = {
    "trunk": lambda name, role: role in ("attention", "embedding"),
    "lower": lambda name, role: role == "router" or ".layers.0." in name,
}


@pytest.fixture(autouse=True)
def rules(tmp_path: Path) -> Iterator[Path]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    install(tmp_path / "site", "rules", RULES, NAMES)
    with found(tmp_path / "site", "rules") as folder:
        yield folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("word", WORDS)
def test_what_it_names_keeps_every_bit_and_its_moments(tmp_path: Path, word: str, precision: str) -> None:
    train = dataclasses.replace(TRAIN, steps=9, weight_decay=0.1, precision=precision)
    works = segments([("", 0, 3), (word, 3, 6), ("", 6, 9)], train)
    straight, apart = fresh(tmp_path, "straight"), fresh(tmp_path, "apart")
    run_chain(straight, works)
    for index, work in enumerate(works):
        run_chain(apart, [work], f"a-{index}")
    assert state_bits(apart, works[-1].key()) == state_bits(straight, works[-1].key())
    before, frozen, after = (tensors(straight, work.key(), "weights") for work in works)
    states = [tensors(straight, work.key(), "optimizer") for work in works]
    kept = 0
    for name, _, role in parameter_roles(build_model(MODEL, 64)):
        expected = WORDS[word](name, role)
        assert torch.equal(before[name], frozen[name]) == expected or precision == "bf16", name
        if expected:
            kept += 1
            assert torch.equal(before[name], frozen[name]), name
            assert all(torch.equal(states[0][f"{name}.{s}"], states[1][f"{name}.{s}"]) for s in ("exp_avg", "step"))
            assert float(states[2][f"{name}.step"]) == 6
    assert 0 < kept < len(before)
    manifest = straight.artifacts.get(works[1].key())
    assert manifest is not None
    assert manifest.info["frozen_sha256"]
    assert after.keys() == before.keys()


def load(folder: Path, text: str) -> str:
    path = folder / "g.yaml"
    path.write_text(f"name: g\nbase: finetune\nevaluate: [lm]\n{text}\n")
    return str(path)


def test_a_grid_uses_it_in_schedules_and_its_package_is_in_the_keys_of_its_phase_alone(tmp_path: Path) -> None:
    def graph(text: str) -> dict[str, TrainWork]:
        stages = build_graph(load_grid(load(tmp_path, text))).stages
        return {key: stage.work for key, stage in stages.items() if isinstance(stage.work, TrainWork)}

    works = graph("factors: {freeze: [none->trunk, none], seed: [0]}")
    words = [work.conditions.train.freeze for work in works.values() if work.conditions.phase == "finetune"]
    assert sorted(words) == ["", "", "trunk"]
    FREEZING.outside["trunk"] = dataclasses.replace(
        FREEZING.outside["trunk"], declaration=FreezeRule("trunk", ("attention", "embedding"), version=3)
    )
    again = graph("factors: {freeze: [none->trunk, none], seed: [0]}")
    changed = [work.conditions.train.freeze for key, work in works.items() if key not in again]
    assert changed == ["trunk"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("factors: {freeze: [none->trnk]}", r"'trnk' is none of none, router, expert, .*trunk.*did you mean 'trunk'"),
        (
            "factors: {freeze: [router]}\nset: {model.moe: {preset: dense, top_k: 1, num_experts: 1}}",
            r"freeze 'router' does not apply: preset 'dense'",
        ),
        ("factors: {freeze: [lower], router_lr_ratio: [0.5, 1.0]}", "the router is frozen all the time"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(GridError) as caught:
        load_grid(load(tmp_path, text))
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_a_dense_model_freezes_what_it_has(tmp_path: Path) -> None:
    text = "factors: {freeze: [none->trunk], seed: [0]}\nset: {model.moe: {preset: dense}}"
    assert load_grid(load(tmp_path, text)).cells


def test_a_rule_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong, said in (
        (("a->b", ("router",)), "cannot be called"),
        (("none", ("router",)), "cannot be called"),
        (("x", ("rooter",)), "did you mean 'router'"),
        (("x",), "freezes nothing"),
    ):
        with pytest.raises(MoegridError, match=said):
            FreezeRule(*wrong)
    (work,) = segments([("gone", 0, 4)], dataclasses.replace(TRAIN, steps=4))
    store = fresh(tmp_path, "store")
    with pytest.raises(MoegridError, match=r"the code of freeze 'gone' of rules 1.2 cannot be imported"):
        run_chain(store, [work])
