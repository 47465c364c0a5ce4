"""Low-rank adapters: peft's own results, all else to the bit as it was, exact forks and resumes, merged afterwards."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.models.adapters import add_adapters, kept_by_adapters
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.models.weights import canonical_state, load_canonical
from jobs.moe.lowrank import adapt, effective
from jobs.node.preemption import Preempted
from jobs.train.freeze import frozen_blocks
from orchestrator.errors import GridError
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import AdapterSpec, TrainSpec
from orchestrator.spec.work import Conditions, TrainWork
from tests.training import MODEL, TRAIN, run_chain, segments, state_bits, tensors
from tests.unit.test_train_exactness import fresh, stop_after

SHARED = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, preset="deepseek_moe", shared_experts=1))
ALL = AdapterSpec(rank=4, alpha=8.0, targets="attention+expert")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def trained(adapter: AdapterSpec, **changes: Any) -> TrainSpec:
    train = dataclasses.replace(TRAIN, steps=6, weight_decay=0.1, adapter=adapter)
    return dataclasses.replace(train, **changes)


def adapted(seed: int = 1) -> CausalLM:
    """A model whose adapters have moved away from 0."""
    torch.manual_seed(0)
    model = build_model(SHARED, 64)
    add_adapters(model, ALL, seed)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("_lora_B"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def test_a_new_adapter_changes_nothing_and_a_moved_one_is_the_merged_weight() -> None:
    torch.manual_seed(0)
    plain = build_model(SHARED, 64).eval()
    begun = build_model(SHARED, 64).eval()
    load_canonical(begun, canonical_state(plain))
    add_adapters(begun, ALL, 1)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(begun.eval()(ids).logits, plain(ids).logits)
        moved = adapted().eval()
        merged = build_model(SHARED, 64).eval()
        load_canonical(merged, canonical_state(moved))
        theirs, ours = merged(ids).logits, moved(ids).logits
    assert not torch.equal(theirs, plain(ids).logits)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_adapters_are_those_of_the_paper_for_a_matrix_and_for_each_expert() -> None:
    """W + alpha / r B A, computed by hand; gradients against autograd through the merged weight."""
    generator = torch.Generator().manual_seed(0)
    linear: Any = torch.nn.Linear(6, 5, bias=False)
    adapt(linear, "weight", 2, 8.0, generator)
    with torch.no_grad():
        linear.weight_lora_B.normal_(generator=generator)
    x = torch.randn(3, 6, generator=generator)
    a, b = linear.weight_lora_A, linear.weight_lora_B
    assert float(a.detach().abs().max()) <= 6**-0.5
    by_hand = x @ (linear.weight + 4.0 * b @ a).T
    torch.testing.assert_close(linear(x), by_hand)
    mine = torch.autograd.grad(linear(x).square().sum(), [a, b])
    theirs = torch.autograd.grad(by_hand.square().sum(), [a, b])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    model = adapted()
    experts: Any = model.get_submodule("backbone.model.layers.0.mlp.block.experts")
    for expert in range(4):
        product = experts.up_lora_B[expert] @ experts.up_lora_A[expert]
        wanted = experts.up[expert] + 2.0 * product
        torch.testing.assert_close(effective(experts, "up")[expert], wanted)


@pytest.mark.parametrize(
    ("targets", "router"),
    [("attention", "frozen"), ("routed_expert", "trained"), ("attention+expert", "trained")],
)
@pytest.mark.parametrize("precision", ["fp32"])
def test_all_else_keeps_its_bits_and_cut_runs_equal_straight_ones(
    tmp_path: Path, targets: str, router: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = AdapterSpec(rank=2, targets=targets, router=router)
    train = trained(adapter, precision=precision)
    works = segments([("", 0, 3), ("router" if router == "trained" else "", 3, 6)], train, model=SHARED)
    straight, cut = fresh(tmp_path, "straight", SHARED), fresh(tmp_path, "cut", SHARED)
    run_chain(straight, works)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Preempted):
            run_chain(cut, works)
    run_chain(cut, works[1:], "b")
    assert state_bits(cut, works[1].key()) == state_bits(straight, works[1].key())
    manifest = straight.artifacts.get(works[0].init)
    assert manifest is not None
    begun = load_file(straight.artifacts.fetch(manifest, "weights.safetensors", tmp_path))
    first, last = (tensors(straight, work.key(), "weights") for work in works)
    roles = {name: role for name, _, role in parameter_roles(build_model(SHARED, 64))}
    for name, role in roles.items():
        still = torch.equal(begun[name].to(last[name].dtype), first[name])
        assert still == (router == "frozen" or role != "router"), name
        assert torch.equal(first[name], last[name]), name
    moved = [name for name in last if name.endswith("_lora_B")]
    assert moved
    assert all(not torch.equal(last[name], torch.zeros_like(last[name])) for name in moved)
    owners = {roles[name.removesuffix("_lora_B")] for name in moved}
    assert owners == set(adapter.roles) if "expert" in targets or targets == "attention" else True
    states = tensors(straight, works[1].key(), "optimizer")
    kept = {name.rpartition(".")[0] for name in states if name.endswith(".exp_avg")}
    assert all("_lora_" in name or roles[name] == "router" for name in kept), "moments of adapters alone"
    assert works[0].key() == segments([("", 0, 3), ("attention", 3, 6)], train, model=SHARED)[0].key()


def test_a_router_beside_adapters_learns_as_they_say() -> None:
    model = build_model(SHARED, 64)
    add_adapters(model, AdapterSpec(rank=2), 0)
    assert frozen_blocks(model, "") == {0, 1}
    other = build_model(SHARED, 64)
    add_adapters(other, AdapterSpec(rank=2, router="trained"), 0)
    assert frozen_blocks(other, "") == frozenset()
    routers = {name for name, _, role in parameter_roles(other) if role == "router"}
    assert kept_by_adapters(model) - kept_by_adapters(other) == routers


def test_a_later_phase_and_muon_go_on_from_adapters(tmp_path: Path) -> None:
    first = segments([("", 0, 4)], trained(ALL, steps=4), model=SHARED)
    second = segments(
        [("", 0, 4)],
        trained(AdapterSpec(rank=3), steps=4, optimizer="muon"),
        model=SHARED,
        phase="finetune",
        tokens="instructions",
        after=first[-1],
    )
    chain, apart = fresh(tmp_path, "chain", SHARED), fresh(tmp_path, "apart", SHARED)
    run_chain(chain, [*first, *second])
    for number, work in enumerate((*first, *second)):
        run_chain(apart, [work], f"a-{number}")
    assert state_bits(chain, second[-1].key()) == state_bits(apart, second[-1].key())
    state = tensors(chain, second[-1].key(), "weights")
    assert not any("experts" in name for name in state if "_lora_" in name), "those of the first phase are merged"


def test_adapters_are_in_the_key_where_there_are_some() -> None:
    def digest(adapter: AdapterSpec) -> str:
        return Conditions("pretrain", trained(adapter), "t", 0).digest()

    variants = [AdapterSpec(), AdapterSpec(2), AdapterSpec(4), AdapterSpec(2, 8.0), AdapterSpec(2, router="trained")]
    assert len({digest(variant) for variant in variants}) == 5
    assert (
        Conditions("pretrain", TRAIN, "t", 0).digest()
        == Conditions("pretrain", trained(AdapterSpec(), steps=16, weight_decay=0.01), "t", 0).digest()
    )


def load(folder: Path, text: str) -> dict[str, TrainWork]:
    path = folder / "g.yaml"
    path.write_text(f"name: g\nbase: finetune\nevaluate: [lm]\nat: [1.0]\n{text}\n")
    stages = build_graph(load_grid(str(path))).stages
    return {key: stage.work for key, stage in stages.items() if isinstance(stage.work, TrainWork)}


def test_a_grid_varies_adapters_over_one_base_model(tmp_path: Path) -> None:
    works = load(
        tmp_path,
        "factors: {adapter_rank: [0, 8], adapter_targets: [attention, expert], freeze: [none, none->router]}\n"
        "when: {adapter_targets: {adapter_rank: [8]}}\n"
        "set: {finetune.adapter.router: trained}",
    )
    phases = [work.conditions.phase for work in works.values()]
    assert phases.count("pretrain") == 1
    assert phases.count("finetune") == 9, "three first halves, six second ones"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set: {finetune.adapter: {rank: -1}}", "must be at least 0, not -1"),
        ("set: {finetune.adapter: {rank: 2, targets: attenton}}", "'attenton' is nothing to adapt.*'attention'"),
        ("set: {finetune.adapter: {rank: 2, targets: shared_expert}}", "the model has none"),
        ("set: {finetune.adapter: {rank: 2, router: both}}", "must be one of 'frozen', 'trained'"),
        ("set: {finetune.adapter: {rank: 2, targets: expert}, model.moe.preset: dense}", "preset 'dense' has none"),
        ("factors: {adapter_targets: [attention, expert]}", "adapter.rank is 0"),
        ("factors: {router_lr_ratio: [0.5, 1.0]}\nset: {finetune.adapter.rank: 2}", "router is frozen all the time"),
    ],
)
def test_a_wrong_adapter_is_told_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    text = text if "factors" in text else f"factors: {{seed: [0]}}\n{text}"
    with pytest.raises(GridError) as caught:
        load(tmp_path, text)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
