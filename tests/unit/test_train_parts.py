"""Learning rates, optimizer groups, the meter's judgement and the NaN stop."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from jobs.train.errors import Diverged, NotFinite, RouterCollapsed
from jobs.train.meter import COLLAPSED_WINDOWS, Meter, load_entropy
from jobs.train.optimizer import (
    assert_learning_rates,
    build_optimizer,
    freeze_tensors,
    plan_groups,
    set_learning_rates,
    take_step,
)
from jobs.train.randomness import seed_of
from jobs.train.schedule import learning_rates, lr_factor
from orchestrator.errors import NumericsError
from tests.training import TRAIN, init_work, prepare, run_chain, segments


def test_warmup_ends_at_the_peak_and_decay_ends_at_the_floor() -> None:
    train = dataclasses.replace(TRAIN, steps=100, warmup_ratio=0.1, min_lr_ratio=0.1)
    factors = [lr_factor(train, step) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert factors[55] == pytest.approx(0.55)
    linear = dataclasses.replace(train, schedule="linear", min_lr_ratio=0.0)
    assert lr_factor(linear, 55) == pytest.approx(0.5)
    assert lr_factor(dataclasses.replace(train, schedule="constant"), 99) == 1.0


def test_router_rate_is_a_ratio_or_absolute_with_the_same_shape() -> None:
    by_ratio = dataclasses.replace(TRAIN, lr=1e-2, router_lr_ratio=0.25)
    absolute = dataclasses.replace(TRAIN, lr=1e-2, router_lr=2.5e-3)
    for step in (0, 7, 15):
        assert learning_rates(by_ratio, step) == pytest.approx(learning_rates(absolute, step))
        lr, router = learning_rates(by_ratio, step)
        assert router == pytest.approx(lr / 4)


def test_seeds_differ_by_place_and_repeat() -> None:
    places = {seed_of(0, "pretrain", step, index) for step in range(20) for index in range(4)}
    assert len(places) == 80
    assert seed_of(3, "finetune", 5, 1) == seed_of(3, "finetune", 5, 1)


def test_frozen_group_is_not_touched_even_with_gradients_and_decay() -> None:
    weight, router = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    tensors = {"weight": weight, "router": router}
    plans = plan_groups([("weight", weight, "other"), ("router", router, "router")])
    optimizer = build_optimizer(dataclasses.replace(TRAIN, weight_decay=0.1), plans, tensors)
    set_learning_rates(optimizer, 0.1, 0.01)
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    take_step(optimizer)
    assert weight[0, 0].item() == pytest.approx(1 - 0.1 - 0.1 * 0.1, abs=1e-6)
    assert router[0, 0].item() == pytest.approx(1 - 0.01 - 0.01 * 0.1, abs=1e-6)
    before = router.detach().clone(), {name: value.clone() for name, value in optimizer.state[router].items()}
    freeze_tensors(optimizer, [router])
    take_step(optimizer)
    assert torch.equal(router, before[0])
    assert all(torch.equal(optimizer.state[router][name], value) for name, value in before[1].items())
    with pytest.raises(NumericsError, match=r"router\.matrices"):
        assert_learning_rates(optimizer, 0.1, 0.02)


def test_load_entropy_bounds() -> None:
    assert load_entropy([[5.0] * 8]) == pytest.approx(3.0)
    assert load_entropy([[10.0, 0.0, 10.0, 0.0]]) == pytest.approx(1.0)


def test_meter_judges_divergence_and_collapse() -> None:
    meter = Meter()
    with pytest.raises(Diverged):
        meter.judge({"train/lm_loss": math.log(64) + 3.1}, 64, 2, 8, True)
    collapsed = {"train/lm_loss": 1.0, "routing/load_balance": 1.001}
    for _ in range(COLLAPSED_WINDOWS - 1):
        meter.judge(collapsed, 64, 2, 8, True)
    meter.judge({**collapsed, "routing/load_balance": 2.0}, 64, 2, 8, True)  # recovered: counted anew
    for _ in range(COLLAPSED_WINDOWS - 1):
        meter.judge(collapsed, 64, 2, 8, True)
    restored = Meter.from_json(meter.to_json())
    with pytest.raises(RouterCollapsed):
        restored.judge(collapsed, 64, 2, 8, True)
    for _ in range(2 * COLLAPSED_WINDOWS):
        Meter().judge(collapsed, 64, 2, 8, False)


def test_step_with_a_nan_is_not_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.train.engines.torch import TorchEngine

    torch.set_num_threads(1)
    store = prepare(str(tmp_path))
    work = segments([("", 0, 8)])[0]
    original = TorchEngine.gradient_norm
    seen: list[dict[str, torch.Tensor]] = []
    norms = 0

    def poisoned(self: TorchEngine) -> torch.Tensor:
        nonlocal norms
        norms += 1
        if norms < 3:
            return original(self)
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        seen.append(dict(self.model.named_parameters()))
        return torch.tensor(float("nan"))

    monkeypatch.setattr(TorchEngine, "gradient_norm", poisoned)
    with pytest.raises(NotFinite, match="step 3"):
        run_chain(store, [init_work(), work])
    assert all(torch.equal(seen[1][name], value) for name, value in seen[0].items())
    assert store.artifacts.get(work.key()) is None
