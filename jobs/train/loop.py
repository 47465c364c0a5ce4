"""Optimizer steps: deterministic in (seed, step), one look at the host per step, nothing applied that is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace

import torch
from torch import Tensor

from jobs.data.packing import IGNORED, Batch, Batches
from jobs.models.backbones import Output
from jobs.moe.balance import balance_loss, collective
from jobs.moe.routing import Routing
from jobs.train.engine import Engine
from jobs.train.errors import NotFinite
from jobs.train.freeze import frozen_blocks
from jobs.train.meter import Meter
from jobs.train.randomness import reseed
from jobs.train.scale import PRECISION, LossScale
from jobs.train.schedule import balance_at, learning_rates
from jobs.train.sums import Sums
from jobs.train.unpadded import fits, together, unpadded
from orchestrator.spec.work import Conditions

# Precisions whose products are rounded under autocast, beside weights in fp32.
AUTOCAST = {"mixed": torch.bfloat16, "fp16": torch.float16}
# Sums over ranks that are no series of their own.
UNLOGGED = frozenset({"requests", "counts", "cutoffs", "passed"})


# A micro-batch's index in its step, the batch, and its weight: 0 of a spare.
_Weighed = tuple[int, Batch, float]


@dataclass
class StepResult:
    """One optimizer step: values by series name, expert counts [L, N], and what any rank asked for.

    `once` are values of this step alone, of which no mean over a window is taken.
    """

    values: dict[str, float]
    counts_LN: list[list[float]]
    requests: list[bool]
    once: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainer:
    """The state of one phase's training besides the engine's tensors."""

    engine: Engine
    conditions: Conditions
    source: Batches
    step: int = 0
    tokens: int = 0
    meter: Meter = field(default_factory=Meter)
    begun: InitVar[LossScale | None] = None  # of a session; None = as a phase begins
    scale: LossScale = field(init=False)
    _layout: dict[str, torch.Size] = field(default_factory=dict)

    def __post_init__(self, begun: LossScale | None) -> None:
        self.scale = begun or LossScale.of(self.conditions.train.precision)

    def train_step(self, requests: Sequence[bool] = (False,), *, router_gradient: bool = False) -> StepResult:
        """Take one optimizer step; raises NotFinite, without a step, when loss or gradient norm is not finite.

        With fp16 a step whose gradients alone are not finite is skipped: it counts, and changes nothing but the scale.

        `requests` are wishes of this rank; the result says which of them any rank had. `router_gradient` also
        measures the gradient that reaches the router's logits (a frozen router passes it on to the trunk).
        """
        engine, train, scale = self.engine, self.conditions.train, self.scale
        lr, router_lr = learning_rates(train, self.step)
        weights = balance_at(train, self.step)
        engine.set_lr(lr, router_lr)
        batches = list(self._micro_batches())
        tokens, seen = self._count_tokens(batches)
        sums = Sums()
        device = batches[0][1].input_ids.device
        sums.add("requests", torch.tensor([float(request) for request in requests]).to(device))
        watched: list[Tensor] = []
        counted = engine.lockstep or collective(train.balance)
        for passed in self._passes(batches):
            index, _, weight = passed[0]
            if not weight and self._layout and not counted:
                continue  # it would add zeros
            reseed(self.conditions.seed, self.conditions.phase, self.step, index)
            output, routed = self._forward([batch for _, batch, _ in passed])
            lm_sum = output.loss
            assert lm_sum is not None
            found = [balance_loss(routings, weights, spare=not weight) for routings in routed]
            if router_gradient:
                watched += _watch_logits(output.routings)
            balance = found[0][0] if len(found) == 1 else torch.stack([one for one, _ in found]).sum()
            share = weight * (lm_sum / tokens + balance / train.accumulation)
            engine.backward(share if scale.value == 1.0 else share * scale.value)
            sums.add("lm_loss", lm_sum, weight / tokens)
            sums.add("loss", balance, weight / train.accumulation)
            for name, part in ((name, part) for _, parts in found for name, part in parts.items()):
                sums.add(name, part, weight / train.accumulation)
            _add_routings(sums, output.routings, weight, train.accumulation)
            del output, routed, lm_sum, found, balance
        self._layout = self._layout or sums.layout()
        sums.fill(self._layout, device)
        if router_gradient:
            sums.add("passed", _square_of_gradients(watched, device), (engine.loss_scale * scale.value) ** -2)
        tensors, lists, norm = sums.reduce(engine, engine.gradient_norm())
        used = scale.value
        norm /= used
        values = {f"train/{name}": value[0] for name, value in lists.items() if name not in UNLOGGED}
        values["train/loss"] += values["train/lm_loss"]
        finite = math.isfinite(norm)
        if not math.isfinite(values["train/loss"]) or not (finite or scale.skip()):
            engine.drop_gradients()
            raise NotFinite(
                f"step {self.step + 1}: loss {values['train/loss']}, gradient norm {norm}",
                hint="lower lr or raise warmup_ratio; the step was not applied and the last committed state is kept",
            )
        values["train/grad_norm"] = norm if finite else 0.0  # of what is applied
        once = {}
        if router_gradient and finite:
            once["train/router_passed_grad_norm"] = math.sqrt(lists["passed"][0])
        if finite:
            engine.step((min(1.0, train.clip / (norm + 1e-6)) if train.clip > 0 else 1.0) / used)
            self._update_blocks(tensors)
            scale.apply(train.precision)
        else:
            engine.drop_gradients()
        if train.precision == PRECISION:
            once |= {"train/loss_scale": scale.value, "train/skipped_steps": float(scale.skipped)}
        self.step += 1
        self.tokens += seen
        experts = tensors["counts"].shape[1] if "counts" in tensors else 1
        counts = lists.get("counts", [])
        rows = [counts[first : first + experts] for first in range(0, len(counts), experts)]
        return StepResult(values, rows, [total > 0 for total in lists["requests"]], once)

    def _micro_batches(self) -> Iterator[_Weighed]:
        """Yield (index, batch, weight) of this rank's micro-batches; every rank yields equally many.

        They are dealt in turn. A rank whose turn has no micro-batch left gets the first one as a spare of weight 0: it
        has to run it where forward passes or losses are collective, and once to learn what is summed.
        """
        train, engine = self.conditions.train, self.engine
        device = next(engine.model.parameters()).device
        for turn in range(math.ceil(train.accumulation / engine.world_size)):
            index = turn * engine.world_size + engine.rank
            weight = float(index < train.accumulation)
            index = index if weight else 0
            yield index, _to(self.source.micro_batch(self.step, index, train.micro_batch), device), weight

    def _count_tokens(self, batches: Sequence[_Weighed]) -> tuple[int, int]:
        """Return (tokens that carry a loss, real tokens) of the whole step, over all micro-batches and ranks."""
        own = torch.zeros(2, dtype=torch.float64, device=batches[0][1].labels.device)
        for _, batch, weight in batches:
            own += weight * torch.stack([(batch.labels != IGNORED).sum(), batch.attention_mask.sum()])
        with_loss, real = self.engine.sum_over_ranks(own).tolist()
        return max(1, int(with_loss)), int(real)

    def _passes(self, batches: Sequence[_Weighed]) -> Iterator[Sequence[_Weighed]]:
        """Yield what is computed at once: a micro-batch, or several small ones where no other rank counts passes."""
        engine, at = self.engine, 0
        alone = engine.lockstep or engine.world_size > 1
        given = [batch for _, batch, _ in batches]
        for size in [1] * len(given) if alone else together(engine.model, self.conditions.train, given):
            yield batches[at : at + size]
            at += size

    def _forward(self, batches: Sequence[Batch]) -> tuple[Output, list[Sequence[Routing]]]:
        """Return what the model says of micro-batches at once, and the records of each."""
        model, train, batch = self.engine.model, self.conditions.train, batches[0]
        unit = model.spec.moe.unit  # resolved: the work's own spec may leave it to the preset
        half = AUTOCAST.get(train.precision)
        device = batch.input_ids.device.type
        with torch.autocast(device, half) if half else contextlib.nullcontext():
            if all(fits(model, train.balance, one) for one in batches):
                row = unpadded(batches, half or next(model.parameters()).dtype)
                output: Output = model(
                    row.input_ids,
                    position_ids=row.position_ids,
                    packing=row.packing,
                    padding=row.padding,
                    labels=row.labels,
                    shifted=True,
                )
                if len(batches) == 1:
                    return output, [output.routings]
                of_layers = [routing.split(row.sizes) for routing in output.routings]
                return output, [[parts[number] for parts in of_layers] for number in range(len(batches))]
            assert len(batches) == 1, "only what fits in one row is computed at once"
            # Padding lies behind what is real, which sees nothing later: attention needs no mask for it.
            output = model(
                batch.input_ids,
                padding=None if bool(batch.attention_mask.all()) else batch.attention_mask == 0,
                spans=batch.spans(unit),
                labels=batch.labels,
                shifted=True,
                **({} if batch.images is None else {"images": batch.images}),
            )
        return output, [output.routings]

    def _update_blocks(self, sums: dict[str, Tensor]) -> None:
        """Move what the router learns without gradients: the aux-loss-free bias and expert choice's thresholds."""
        train = self.conditions.train
        frozen = frozen_blocks(self.engine.model, train.freeze)
        for layer, block in enumerate(self.engine.model.moe_blocks):
            if layer in frozen:
                continue
            if train.balance.bias_rate and block.moe.balance_bias:
                block.update_balance_bias(sums["counts"][layer], train.balance.bias_rate, train.balance.bias_center)
            if "cutoffs" in sums:
                block.update_thresholds(sums["cutoffs"][layer].float())


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    held = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return replace(batch, **{name: one.to(device, non_blocking=True) for name, one in held.items() if one is not None})


def _add_routings(sums: Sums, routings: Sequence[Routing], weight: float, accumulation: int) -> None:
    if not routings:
        return
    sums.add("counts", torch.stack([routing.counts for routing in routings]), weight)
    cutoffs = [routing.cutoffs for routing in routings if routing.cutoffs is not None]
    if cutoffs:
        sums.add("cutoffs", torch.stack(cutoffs), weight / accumulation)


def _watch_logits(routings: Sequence[Routing]) -> list[Tensor]:
    watched = [routing.logits for routing in routings if routing.logits.requires_grad]
    for logits in watched:
        logits.retain_grad()
    return watched


def _square_of_gradients(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all gradients."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not gradients:
        return torch.zeros(1, device=device)
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum().reshape(1)
