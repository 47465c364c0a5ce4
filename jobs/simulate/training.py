"""One training phase without values: its start, steps under every freeze word, switches and a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from jobs.data.packing import Batch
from jobs.models.adapters import add_adapters
from jobs.models.backbones import CausalLM, Output
from jobs.models.building import empty_model
from jobs.models.shards import Rows
from jobs.moe.routing import Routing
from jobs.simulate.answer import Answer, counted
from jobs.simulate.ledger import Ledger, Operation
from jobs.simulate.world import Weights, simulated
from jobs.train.checkpoint import IN_FLIGHT, SMALL_BYTES
from jobs.train.engine import Engine
from jobs.train.engines.building import build_engine
from jobs.train.loop import Trainer
from jobs.train.schedule import learning_rates
from orchestrator.catalog.freezing import freezes
from orchestrator.spec.cell import ONE_COPY, Parallel
from orchestrator.spec.model import Model
from orchestrator.spec.training import TrainSpec
from orchestrator.spec.vision import FEATURES, PIXELS, EncoderSpec
from orchestrator.spec.work import Conditions

# Micro-batches of a rank that are run: the second meets the gradients of the first, and so does every later one.
TURNS = 2
# What of DeepSpeed raises where ranks differ.
COMPARED = ("deepspeed.runtime.zero.partitioned_param_coordinator", "assert_ints_same_as_other_ranks")


@dataclass(frozen=True, slots=True)
class Training:
    """What decides the memory of a phase's steps; `words` are what is frozen in some span of it ("" = nothing)."""

    model: Model
    vocab_size: int
    phase: str
    train: TrainSpec
    engine: str
    ranks: int
    words: tuple[str, ...] = ("",)
    parallel: Parallel = ONE_COPY
    recompute: str = "none"
    images: str = ""  # of a model that sees: PIXELS or FEATURES (orchestrator.spec.vision), "" where text alone is read


@dataclass(frozen=True, slots=True)
class NoText:
    """A source of micro-batches without values, `length` tokens a sequence, behind `images` for a vision side."""

    length: int
    vision: EncoderSpec | None = None
    images: str = ""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return a micro-batch of `size` sequences."""
        names = [item.name for item in dataclasses.fields(Batch) if item.name != "images"]
        text = {name: torch.zeros(size, self.length, dtype=torch.long) for name in names}
        seen = no_pictures(self.vision, size, self.images) if self.vision is not None and self.images else None
        return Batch(**text, images=seen)


def no_pictures(vision: EncoderSpec, number: int, images: str = PIXELS) -> Tensor:
    """Return pictures without values: pixels [n, H, W, 3], or the features [n, P, D] of a frozen encoder."""
    if images == FEATURES:
        return torch.zeros(number, vision.patches, vision.hidden_size)
    return torch.zeros(number, vision.image_size, vision.image_size, 3, dtype=torch.uint8)


class _Trainer(Trainer):
    """Finds padding in instructions and none in text; whatever else has no values is found to be 0."""

    ledger: Ledger

    def _forward(self, batches: Sequence[Batch]) -> tuple[Output, list[Sequence[Routing]]]:
        self.ledger.truth = self.conditions.train.data.format == "text"
        try:
            return super()._forward(batches)
        finally:
            self.ledger.truth = False


def simulate_training(asked: Training) -> Answer:
    """Run one rank's start, steps, freeze switches and checkpoint without values."""
    # Its parameters never get memory; made outside, so that nobody counts them.
    model = empty_model(asked.model, asked.vocab_size)
    begun = add_adapters(model, asked.train.adapter, 0)
    del begun
    model.recompute = asked.recompute
    for block in model.moe_blocks:
        block.expert_dropout = asked.train.expert_dropout
    turns = -(-asked.train.accumulation // asked.ranks)
    train = dataclasses.replace(asked.train, accumulation=min(asked.train.accumulation, TURNS * asked.ranks))
    answer = Answer(parameters=sum(parameter.numel() for parameter in model.parameters()))
    with simulated(asked.ranks) as ledger, following_optimizers(ledger):
        engine = started(ledger, model, train, asked)
        answer.moments["start"] = ledger.peak()
        # What trains all comes first: later words find every moment in its place.
        for word in sorted(asked.words, key=lambda word: (word != "", word)):
            begin = ledger.mark()
            engine.freeze(word)
            answer.add("switch", ledger.peak(begin))
            conditions = Conditions(asked.phase, dataclasses.replace(train, freeze=word), "", 0)
            trainer = _Trainer(engine, conditions, NoText(train.sequence_length, asked.model.vision, asked.images))
            trainer.ledger = ledger
            for _ in range(1 if answer.operations else 2):
                ledger.forget_operations()
                begin = ledger.mark()
                first = stepped(ledger, trainer)
                answer.add("step", ledger.peak(begin))
            if not answer.operations:
                more = max(0, turns - TURNS)
                answer.operations = ledger.operations + Counter({one: n * more for one, n in first[0].items()})
                answer.collectives = ledger.collectives + Counter({one: n * more for one, n in first[1].items()})
                answer.looks = ledger.looks
            begin = ledger.mark()
            answer.host = max(answer.host, copied(engine))
            answer.add("checkpoint", ledger.peak(begin))
    largest = max(parameter.numel() for parameter in model.parameters())
    answer.host += 4 * largest  # read, or converted, one at a time
    return counted(answer)


def started(ledger: Ledger, model: CausalLM, train: TrainSpec, asked: Training) -> Engine:
    """Return the engine over the model, whose parameters get memory without values."""
    with ledger.allocating("buffers"):
        without_values(model)
    # DeepSpeed moves and casts the module, which torch does not do to tensors without values: they lie and are right.
    model._apply = lambda *args, **kwargs: model  # type: ignore[method-assign]
    with ledger.allocating("optimizer"):  # masters, unless it is one of the next
        engine = build_engine(asked.engine, model, train, 0, asked.ranks, Weights(model), "cpu", asked.parallel)
    ledger.name(map(local, model.parameters()), "weights")
    module, function = COMPARED
    if module in sys.modules:  # ranks would compare what has no values
        setattr(sys.modules[module], function, lambda *_: None)
    engine.model.train()
    return engine


def without_values(model: CausalLM) -> None:
    """Put buffers without values in the place of the model's own."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    inner = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(inner, Tensor)
    return inner.detach()


def stepped(ledger: Ledger, trainer: Trainer) -> tuple[Counter[Operation], Counter[tuple[str, int]]]:
    """Take one step; return the operations and collectives of the first micro-batch alone."""
    engine, train = trainer.engine, trainer.conditions.train
    first: list[tuple[Counter[Operation], Counter[tuple[str, int]]]] = []
    backward = engine.backward

    def noted(loss: Tensor) -> None:
        backward(loss)
        if not first:
            first.append((ledger.operations.copy(), ledger.collectives.copy()))

    engine.set_lr(*learning_rates(train, trainer.step))
    engine.backward = noted  # type: ignore[method-assign]
    try:
        trainer.train_step(router_gradient=freezes(train.freeze, "router"))
    finally:
        engine.backward = backward  # type: ignore[method-assign]
    return first[0]


def copied(engine: Engine) -> int:
    """Return the bytes of host memory into which a checkpoint copies this rank's share."""
    weights = sum(_written(rows) for _, rows in engine.weights())
    share = weights + sum(piece.tensor.nbytes for piece in engine.optimizer_tensors().values())
    return share * (IN_FLIGHT if share <= SMALL_BYTES else 1)


def _written(rows: Rows) -> int:
    return rows.tensor.numel() * rows.written.itemsize


@contextmanager
def following_optimizers(ledger: Ledger) -> Iterator[None]:
    """Tell a ledger, at each step of an optimizer, what are gradients and what is the optimizer's state."""

    def before(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        ledger.name((parameter.grad for group in optimizer.param_groups for parameter in group["params"]), "gradients")
        ledger.kind = "optimizer"

    def after(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        ledger.kind = "activations"

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
