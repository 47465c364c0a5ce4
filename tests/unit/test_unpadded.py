"""Micro-batches without their padding train as those with it, whatever routes and attends."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.data.packing import IGNORED, Batch
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.node import machine
from jobs.train import loop
from jobs.train.engines.torch import TorchEngine
from jobs.train.loop import StepResult, Trainer
from jobs.train.unpadded import fits, together, unpadded
from orchestrator.spec.cell import BalanceSpec, DataSpec, TrainSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import Conditions
from tests.unit.test_packed_scoring import ATTENTION, ROUTED

VOCABULARY = 64
SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "context": 128, "init_std": 0.1}
MOE = MoESpec(num_experts=4, top_k=2, expert_width=16, router_init_std=0.5)
TRAIN = TrainSpec(
    data=DataSpec("given", format="instruction"),
    steps=8,
    micro_batch=5,
    accumulation=2,
    sequence_length=64,
    schedule="constant",
    warmup_ratio=0.0,
    lr=1e-3,
    router_lr=1e-3,
    balance=BalanceSpec(aux_coef=0.1, z_coef=0.1),
)


def examples(seed: int, lengths: tuple[int, ...] = (40, 3, 23, 1, 17)) -> Batch:
    """Return examples whose second half carries a loss, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    places, ends = torch.arange(shape[1]), torch.tensor(lengths)[:, None]
    mask = (places < ends).long()
    ids = torch.randint(1, VOCABULARY, shape, generator=generator) * mask
    labels = torch.randint(1, VOCABULARY, shape, generator=generator)
    labels = labels.masked_fill((places < ends // 2) | (places >= ends), IGNORED)
    spans = (torch.rand(shape, generator=generator) < 0.4).long().cumsum(1)
    return Batch(ids, labels, mask, spans, spans)


class Given:
    """Two micro-batches of examples a step."""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        return examples(2 * step + index)


def model_of(moe: MoESpec = MOE, **fields: Any) -> CausalLM:
    torch.manual_seed(0)
    return build_model(resolve_model(ModelSpec(moe=moe, **{**SIZES, **fields})), VOCABULARY).train()


def step(model: CausalLM, train: TrainSpec = TRAIN, seed: int = 0) -> tuple[StepResult, dict[str, Tensor]]:
    """Take one optimizer step; return its values and the gradients that it was made of."""
    engine, found = TorchEngine(model, train), {}
    engine.freeze("")
    taken = engine.step

    def look(scale: float) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        taken(scale)

    engine.step = look  # type: ignore[method-assign]
    result = Trainer(engine, Conditions("finetune", train, "", seed), Given()).train_step()
    return result, found


def padded(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **named: Any) -> tuple[StepResult, dict[str, Tensor]]:
    with monkeypatch.context() as patched:
        patched.setattr(loop, "fits", lambda *_: False)
        patched.setattr(loop, "together", lambda model, train, batches: [1] * len(batches))
        return step(*arguments, **named)


def compare(
    one: tuple[StepResult, dict[str, Tensor]], other: tuple[StepResult, dict[str, Tensor]], bound: float = 2e-5
) -> None:
    assert one[0].values == pytest.approx(other[0].values, rel=bound, abs=1e-7)
    assert one[0].counts_LN == other[0].counts_LN
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - other[1][name]).norm() / other[1][name].norm().clamp_min(1e-6)
        assert error < bound, f"{name}: {error}"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_are_those_of_padded_examples(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ATTENTION[name]
    monkeypatch.setattr(machine, "has_fast_products", lambda: fast)
    assert fits(model_of(**fields), TRAIN.balance, examples(0)) == (not fields.get("attention_sinks"))
    compare(step(model_of(**fields)), padded(monkeypatch, model_of(**fields)))


@pytest.mark.parametrize("moe", ROUTED, ids=lambda moe: f"{moe.preset}-{moe.variant}-{moe.choice}")
def test_gradients_do_not_depend_on_padding_whatever_routes(moe: MoESpec, monkeypatch: pytest.MonkeyPatch) -> None:
    own = padded(monkeypatch, model_of(moe))
    drawn = padded(monkeypatch, model_of(moe), seed=1)[0].values != own[0].values
    if drawn:
        pytest.skip("it draws at random, and for real tokens alone where there is no padding")
    compare(step(model_of(moe)), own)


@pytest.mark.parametrize("precision", ["mixed", "bf16", "fp16"])
def test_losses_in_half_precision_are_those_of_padded_examples(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = dataclasses.replace(TRAIN, precision=precision)
    one, other = step(model_of(), train)[0].values, padded(monkeypatch, model_of(), train)[0].values
    assert one["train/lm_loss"] == pytest.approx(other["train/lm_loss"], rel=2e-3)
    assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=2e-2)


def test_padding_stays_where_a_row_of_the_batch_means_something() -> None:
    plain, batch = model_of(), examples(0)
    assert fits(plain, TRAIN.balance, batch)
    for balance in (BalanceSpec(aux_group="sequence"), BalanceSpec(aux_variant="sequence")):
        assert not fits(plain, balance, batch)
    assert not fits(plain, TRAIN.balance, dataclasses.replace(batch, attention_mask=torch.ones_like(batch.input_ids)))
    assert not fits(plain, TRAIN.balance, dataclasses.replace(batch, images=torch.zeros(5, 2, 2, 3)))
    for moe in (MoESpec(unit="word"), MoESpec(preset="expert_choice"), MoESpec(overflow="capacity")):
        own = dataclasses.replace(moe, num_experts=4, top_k=2, expert_width=16)
        assert not fits(model_of(own), TRAIN.balance, batch), own
    learnt = model_of(MoESpec(preset="expert_choice", num_experts=4, expert_width=16, train_select="threshold"))
    for block in learnt.moe_blocks:
        block.update_thresholds(torch.full((4,), 0.1))
    assert learnt.cacheable
    assert not fits(learnt, TRAIN.balance, batch)


@pytest.mark.parametrize("fast", [False, True])
def test_a_row_holds_the_real_tokens_alone(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_fast_products", lambda: fast)
    batch = examples(0)
    row = unpadded([batch], torch.float32)
    real, more = 40 + 3 + 23 + 1 + 17, 44 if fast else 0
    assert row.input_ids.tolist() == [batch.input_ids[batch.attention_mask.bool()].tolist() + [0] * more]
    assert row.labels.shape == (1, real + more)
    assert (row.labels != IGNORED).sum() == (batch.labels != IGNORED).sum()
    ends = [0, 40, 43, 66, 67, 84, *([84 + more] if more else [])]
    assert [(one.first, one.last, one.start, one.end) for one in row.packing.own] == [
        (a, b, a, b) for a, b in pairwise(ends)
    ]
    assert row.position_ids.tolist() == [[n for a, b in pairwise(ends) for n in range(b - a)]]
    assert (row.padding is not None) == fast
    if row.padding is not None:
        assert row.padding.nonzero()[:, 1].tolist() == list(range(real, real + more))
    assert row.sizes == (real + more,)


@pytest.mark.parametrize("fast", [False, True])
def test_small_micro_batches_are_one_row_each_with_losses_of_its_own(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_fast_products", lambda: fast)
    model = model_of()
    passes: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    result = step(model)[0]
    assert passes == [192 if fast else 168]
    apart = [padded(monkeypatch, model_of(), dataclasses.replace(TRAIN, accumulation=1))[0].values["train/aux_loss"]]
    monkeypatch.setattr(Given, "micro_batch", lambda self, step, index, size: examples(1))
    apart += [padded(monkeypatch, model_of(), dataclasses.replace(TRAIN, accumulation=1))[0].values["train/aux_loss"]]
    assert apart[0] != pytest.approx(apart[1], rel=1e-3)
    assert result.values["train/aux_loss"] == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_a_row_takes_no_more_tokens_than_a_full_micro_batch() -> None:
    model, full = model_of(), examples(0, (40,) * 5)
    batches = [examples(0), examples(1), examples(2), examples(3), full, examples(4)]
    train = dataclasses.replace(TRAIN, sequence_length=40)
    assert together(model, train, batches) == [2, 2, 1, 1]  # 84 tokens each, 200 at most
    assert together(model, dataclasses.replace(train, sequence_length=17), batches) == [1] * 6
    balance = BalanceSpec(aux_group="sequence")
    assert together(model, dataclasses.replace(train, balance=balance), batches) == [1] * 6
    assert together(model, train, []) == []
