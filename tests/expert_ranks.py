"""What each of four ranks computes of the validity matrix with its experts dealt, and without: run by the tests.

    python -m tests.expert_ranks RANK FOLDER

Writes `FOLDER/RANK.json`: by case, the largest deviations of outputs, losses and gradients from the experts undealt.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.models.building import build_model, empty_model
from jobs.models.roles import parameter_roles
from jobs.models.weights import canonical_state
from jobs.moe.balance import balance_loss
from jobs.moe.block import MoEBlock, build_block
from jobs.moe.interventions import dropped, pruned, random_routing, temperature
from jobs.moe.lowrank import adapt
from jobs.moe.parallel import ExpertGroup
from jobs.moe.routing import Routing
from jobs.train.collaboration import profile_collaboration
from jobs.train.engines.building import build_engine
from orchestrator.catalog.experts import EXPERTS
from orchestrator.catalog.routers import ROUTERS, kind_of
from orchestrator.spec.cell import BalanceSpec, Parallel
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_moe
from tests.training import TRAIN
from tests.unit.test_moe_matrix import BATCH, COMBINATIONS, LENGTH, SIZES, VOCAB, batch, name

RANKS = 4
WIDTH = 16
PATHS = ("grouped", "loop")
BALANCE = BalanceSpec(
    aux_coef=0.1, aux_scope="global", z_coef=0.01, entropy_coef=0.01, null_coef=0.01, mutual_information_coef=0.01
)
SWITCHES: dict[str, Callable[[MoEBlock], AbstractContextManager[None]]] = {
    "pruned": lambda block: pruned(block, {0: [0, 1, 2]}),
    "random": lambda block: random_routing(block, 3),
    "dropped": lambda block: dropped(block, 1),
    "temperature": lambda block: temperature(block, 0.5),
}


def cases() -> dict[str, tuple[MoESpec, str]]:
    """Return (block, intervention, path of the experts or what else is done) by name."""
    found = {name(moe): (moe, "") for moe in COMBINATIONS if kind_of(resolve_moe(moe)).routes}
    smoe = MoESpec(preset="smoe", **SIZES)
    for form in EXPERTS.builtins:
        found |= {f"{form} {path}": (dataclasses.replace(smoe, expert=form), path) for path in PATHS}
    return found | {what: (smoe, what) for what in (*SWITCHES, "adapter", "no tokens", "mixed")}


Seen = tuple[Tensor, Tensor, Routing, dict[str, Tensor]]


def computed(block: MoEBlock, what: str, rank: int) -> Seen:
    """Return (output, loss, routing record, gradients by name) of this rank's own tokens."""
    inputs = batch(rank)
    torch.manual_seed(rank)  # noise and draws of routers
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, requires_grad=True)
    previous = torch.randn(BATCH * LENGTH, block.router.carried_size, generator=generator)
    padding = inputs["attention_mask"] == 0
    if what == "no tokens" and rank != 1:
        padding = torch.ones_like(padding)
    with SWITCHES.get(what, lambda _: nullcontext())(block), torch.autocast("cpu", enabled=what == "mixed"):
        y, routing = block(
            x,
            inputs["spans"],
            padding,
            previous=previous,
            keys=inputs["input_ids"].view(-1),
            tokens=inputs["input_ids"],
        )
    loss = (y * torch.randn(y.shape, generator=generator)).sum() / LENGTH + balance_loss([routing], BALANCE)[0]
    loss.backward()
    assert x.grad is not None
    gradients = {key: p.grad for key, p in block.named_parameters() if p.grad is not None} | {"x": x.grad}
    return y.detach(), loss.detach(), routing, gradients


def deviation(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max(1, max|b|)."""
    return float((a - b).detach().abs().max() / b.abs().max().clamp_min(1)) if a.numel() else 0.0


def compared(moe: MoESpec, what: str, groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """Return the largest deviation by what deviates, over the groups."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    block = build_block(moe, hidden_size=WIDTH, init_std=0.1, vocab_size=VOCAB)
    assert isinstance(block, MoEBlock)
    if what == "adapter":
        for weight in ("up", "down"):
            adapt(block.experts, weight, 2, 4.0, torch.Generator().manual_seed(0))
    for parameter in block.parameters():
        if not parameter.any():  # biases, and the second half of an adapter
            torch.nn.init.normal_(parameter, std=0.1)
    if what in PATHS:
        block.experts.choose_path = lambda x_TD, framed=False: what  # type: ignore[misc, method-assign]
    whole, worst = computed(copy.deepcopy(block), what, rank), dict.fromkeys(("output", "loss", "gradients"), 0.0)
    for group in groups:
        dealt = copy.deepcopy(block)
        dealt.experts.deal(group)
        own = computed(dealt, what, rank)
        names = {f"experts.{leaf}" for leaf, _ in dealt.experts.named_parameters()}
        assert names <= own[3].keys(), f"no gradient: {sorted(names - own[3].keys())}"
        assert torch.equal(own[2].indices, whole[2].indices), "another routing"
        worst["output"] = max(worst["output"], deviation(own[0], whole[0]))
        worst["loss"] = max(worst["loss"], deviation(own[1], whole[1]))
        for key, gradient in own[3].items():
            expected = whole[3][key]
            if key in names:
                # An expert's gradient is the sum over the tokens of all ranks of its group.
                expected = expected.clone()
                dist.all_reduce(expected, group=group.group)
                first = group.first(len(expected))
                expected = expected[first : first + len(gradient)]
            worst["gradients"] = max(worst["gradients"], deviation(gradient, expected))
    return worst


def steps() -> dict[str, tuple[MoESpec, Parallel]]:
    """Return (block, mesh) by name: engine fsdp takes a step with every preset, and with one under every mesh."""
    two, copies = Parallel(expert=2), Parallel(shard=2, expert=2)
    smoe = MoESpec(preset="smoe", **SIZES)
    meshes = (two, copies, Parallel(expert=4), Parallel(shard=2))
    found = {f"{preset} {copies}": (MoESpec(preset=preset, **SIZES), copies) for preset in ROUTERS.builtins}
    return found | {f"smoe {mesh}": (smoe, mesh) for mesh in meshes}


def stepped(moe: MoESpec, parallel: Parallel) -> dict[str, float]:
    """Return how far a step's gradients and their norm are from those of whole models, summed over ranks."""
    rank = dist.get_rank()
    spec = ModelSpec(hidden_size=WIDTH, num_layers=2, num_heads=2, num_kv_heads=2, moe=moe)
    torch.manual_seed(0)
    model = build_model(spec, VOCAB)
    weights = {key: tensor.clone() for key, tensor in canonical_state(model).items()}
    engine = build_engine("fsdp", empty_model(spec, VOCAB), TRAIN, rank, RANKS, weights, "cpu", parallel)
    engine.freeze("")
    losses = []
    for one in (model, engine.model):
        if resolve_moe(moe).collaboration_top:
            same = batch(9)
            profile_collaboration(one, [(same["input_ids"], same["attention_mask"], None)])
        torch.manual_seed(rank)
        output = one(**batch(rank))
        losses.append(output.loss / LENGTH + balance_loss(output.routings, BALANCE)[0])
    losses[0].backward()
    engine.backward(losses[1])
    norm, expected = engine.gradient_norm(), {}
    for key, parameter, _ in parameter_roles(model):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        expected[key] = parameter.grad
    engine.step(1.0)
    worst = 0.0
    for key, piece in engine.optimizer_tensors().items():
        name, _, slot = key.rpartition(".")
        if slot == "exp_avg":  # after one step (1 - beta_1) times the gradient
            whole = expected[name]
            rows = whole[piece.first : piece.first + len(piece.tensor)] if whole.dim() else whole
            worst = max(worst, deviation(piece.tensor / (1 - TRAIN.betas[0]), rows))
    right = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return {"loss": deviation(losses[1], losses[0]), "norm": float(norm / right - 1), "gradients": worst}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    groups = []
    for size in (1, 2, 4):
        for first in range(0, RANKS, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                groups.append(ExpertGroup(group, rank - first, size))
    report, seen = {}, set()
    for case, (moe, what) in cases().items():
        # Groups of one and two for one block of each preset and variant; of four for all.
        report[case] = compared(moe, what, groups[(moe.preset, moe.variant, what) in seen and 2 :])
        seen.add((moe.preset, moe.variant, what))
    report |= {case: stepped(*asked) for case, asked in steps().items()}
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
