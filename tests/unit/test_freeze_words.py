"""Freezing by layer and by pattern beside roles: the words, their keys, and bits that stay, in what learns too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.node.preemption import Preempted
from jobs.train.freeze import frozen_blocks
from orchestrator.catalog.freezing import canonical, freezes, freezes_moe_alone, parts_of
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.schedule import parse_freeze
from orchestrator.spec.work import TrainWork
from tests.training import MODEL, TRAIN, run_chain, segments, state_bits, tensors
from tests.unit.test_train_exactness import fresh, stop_after

Frozen = Callable[[str, str], bool]
WORDS: dict[str, Frozen] = {
    "layers(0)": lambda name, role: ".layers.0." in name,
    "router(-1)": lambda name, role: ".layers.1." in name and role == "router",
    "name(*.q_proj.*)": lambda name, role: ".q_proj." in name,
    "expert(1)+attention": lambda name, role: role == "attention" or (".layers.1." in name and role == "routed_expert"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("word", WORDS)
def test_what_a_word_names_keeps_every_bit_and_its_moments(
    tmp_path: Path, word: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dataclasses.replace(TRAIN, steps=6, weight_decay=0.1, precision=precision)
    works = segments([("", 0, 2), (canonical(word), 2, 4), ("", 4, 6)], train)
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    run_chain(straight, works)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted):
            run_chain(cut, works)
    run_chain(cut, works[1:], "b")
    assert state_bits(cut, works[-1].key()) == state_bits(straight, works[-1].key())
    before, frozen, _ = (tensors(straight, work.key(), "weights") for work in works)
    states = [tensors(straight, work.key(), "optimizer") for work in works]
    kept = 0
    for name, _, role in parameter_roles(build_model(MODEL, 64)):
        expected = WORDS[word](name, role)
        kept += expected
        assert torch.equal(before[name], frozen[name]) == expected or (precision == "bf16" and not expected), name
        assert float(states[2][f"{name}.step"]) == (4 if expected else 6)
    assert 0 < kept < len(before)


def test_what_a_router_learns_without_gradients_is_kept_in_its_layers_alone(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="deepseek_moe", balance_bias=True))
    works = segments([("", 0, 2), ("router(0)", 2, 6)], TRAIN, model=model)
    store = fresh(tmp_path, "store", model)
    run_chain(store, works)
    before, after = (tensors(store, work.key(), "weights") for work in works)
    biases = {
        int(re.findall(r"layers\.(\d+)", name)[0]): name for name in before if "bias" in name and "router" in name
    }
    assert set(biases) == {0, 1}
    assert [torch.equal(before[biases[layer]], after[biases[layer]]) for layer in (0, 1)] == [True, False]
    built = build_model(model, 64)
    assert frozen_blocks(built, "router(0)") == {0}
    assert frozen_blocks(built, "layers(-1)") == {1}
    assert frozen_blocks(built, "attention") == frozenset()
    assert frozen_blocks(built, "attention+router") == {0, 1}


def test_one_freezing_has_one_text() -> None:
    assert canonical("router + expert(2,0-1)") == canonical("expert(0,1-2)+router") == "expert(0-2)+router"
    assert canonical("layers(-1,0)") == "layers(-1,0)"
    assert parse_freeze("none->router@0.5".replace("->", "@0->")) == (("none", 0.0), ("router", 0.5))
    assert freezes("attention+router", "router")
    assert not freezes("router(0)", "router")
    assert freezes_moe_alone("router(0)+expert")
    assert not freezes_moe_alone("router+layers(0)")
    assert not parts_of("")


def test_a_pattern_that_names_nothing_is_refused_before_a_step(tmp_path: Path) -> None:
    (work,) = segments([("name(*.no_such.*)", 0, 4)], TRAIN)
    with pytest.raises(MoegridError, match=r"'name\(\*.no_such.\*\)' names no parameter"):
        run_chain(fresh(tmp_path, "store"), [work])


def load(folder: Path, text: str) -> dict[str, TrainWork]:
    path = folder / "g.yaml"
    path.write_text(f"name: g\nbase: finetune\nevaluate: [lm]\nat: [1.0]\n{text}\n")
    stages = build_graph(load_grid(str(path))).stages
    return {key: stage.work for key, stage in stages.items() if isinstance(stage.work, TrainWork)}


def test_schedules_share_their_first_half_and_words_have_keys_of_their_own(tmp_path: Path) -> None:
    works = load(
        tmp_path, "factors: {freeze: [none->layers(0-1), 'none->name(*q_proj*)', 'none->router(1)+attention']}"
    )
    words = [work.conditions.train.freeze for work in works.values() if work.conditions.phase == "finetune"]
    assert sorted(words) == ["", "attention+router(1)", "layers(0-1)", "name(*q_proj*)"]
    same = load(tmp_path, "factors: {freeze: ['none->layers(0,1)']}")
    assert set(same) <= set(works)


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("layers", r"'layers' names no layers, as in layers\(0-3\)"),
        ("layers(3-1)", "'3-1' are no layers"),
        ("layers(a)", "'a' are no layers, as in 0-3, 7 or -1"),
        ("layers(0-9)", r"names layer 9 of a model of 4 layers.*layers are 0 to 3"),
        ("router(0", "no closing parenthesis"),
        ("name()", "no pattern"),
        ("ruter(0)", r"'ruter' is none of none, router.*did you mean 'router'"),
        ("router+experts", r"'experts' is none of.*did you mean 'expert'"),
    ],
)
def test_a_wrong_word_is_told_before_anything_runs(tmp_path: Path, freeze: str, said: str) -> None:
    with pytest.raises(GridError) as caught:
        load(tmp_path, f"factors: {{freeze: ['none->{freeze}']}}")
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
