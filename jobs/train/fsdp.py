"""FSDP2: weights, gradients and optimizer state sharded over ranks along each parameter's first dimension.

Every freeze phase gets a freshly sharded model: FSDP2 keeps the `requires_grad` that a parameter had when it was first
gathered. Weights and optimizer state are carried over, and to and from the store, parameter by parameter in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jobs.models.backbones import CausalLM, build_model, canonical_state, load_canonical, parameter_roles
from jobs.train.freeze import apply_freeze
from jobs.train.optimizer import (
    FROZEN_ROLES,
    FreezableAdamW,
    assert_learning_rates,
    build_optimizer,
    export_state,
    freeze_groups,
    import_state,
    plan_groups,
    set_learning_rates,
)
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import TrainSpec


class FsdpEngine:
    """Sharded fp32 weights and moments; with `bf16` they are the masters of weights that are gathered in bf16."""

    lockstep = True

    def __init__(self, model: CausalLM, train: TrainSpec, rank: int, world_size: int) -> None:
        if world_size < 2:
            raise MoegridError("engine fsdp needs two processes or more", hint="engine: torch runs on one")
        self.model, self.rank, self.world_size = model, rank, world_size
        self._train = train
        self._frozen: str | None = None
        self._turns = -(-train.accumulation // world_size)
        self._turn = 0
        self._optimizer: FreezableAdamW | None = None
        self._waiting: Mapping[str, Tensor] = {}
        device = next(model.parameters()).device.type
        self._mesh = init_device_mesh(device, (world_size,))

    def freeze(self, frozen: str) -> None:
        if frozen == self._frozen:
            return
        if self._optimizer is not None:
            self._waiting = self._gathered_optimizer()
            device = next(self.model.parameters()).device
            fresh = build_model(self.model.spec, int(self.model.config.vocab_size)).to(device)
            load_canonical(fresh, self._gathered_weights())
            self.model = fresh
        self._frozen = frozen
        apply_freeze(self.model, frozen)
        half = torch.bfloat16 if self._train.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in self.model.layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(self.model, mesh=self._mesh, mp_policy=policy)
        roles = list(parameter_roles(self.model))
        self._parameters: dict[str, Any] = {name: parameter for name, parameter, _ in roles}
        self._trained = [name for name, _, role in roles if role not in FROZEN_ROLES[frozen]]
        self._shards = {name: parameter.to_local().detach() for name, parameter in self._parameters.items()}
        self._names = {id(shard): name for name, shard in self._shards.items()}
        self._optimizer = build_optimizer(self._train, plan_groups(roles), self._shards)
        freeze_groups(self._optimizer, frozen)
        self._take_over()

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self._built, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self._built, lr, router_lr)

    def backward(self, loss: Tensor) -> None:
        self._turn += 1
        self.model.set_requires_gradient_sync(self._turn == self._turns)  # type: ignore[operator]
        # FSDP averages over ranks; the loss is already every micro-batch's share of one sum.
        (loss * self.world_size).backward()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gradient_norm(self) -> Tensor:
        for name in self._trained:
            gradient = self._parameters[name].grad
            self._shards[name].grad = None if gradient is None else gradient.to_local()
        square = torch.stack(torch._foreach_norm(self._gradients())).square().sum()
        dist.all_reduce(square)
        return square.sqrt()

    def step(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(self._gradients(), scale)
        self._built.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self._turn = 0
        for name in self._trained:
            self._parameters[name].grad = self._shards[name].grad = None

    def weights(self) -> dict[str, Tensor]:
        half = self._train.precision == "bf16"
        gathered = self._gathered_weights()
        return {name: t.bfloat16() if half and name in self._parameters else t for name, t in gathered.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = self._gathered_optimizer()
        names = sorted(tensors)[self.rank :: self.world_size]
        return {name: tensors[name] for name in names}

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        self._waiting = tensors
        if self._optimizer is not None:
            self._take_over()

    @property
    def _built(self) -> FreezableAdamW:
        assert self._optimizer is not None, "freeze() comes first"
        return self._optimizer

    def _gradients(self) -> list[Tensor]:
        gradients = (self._shards[name].grad for name in self._trained)
        return [gradient for gradient in gradients if gradient is not None]

    def _gathered_weights(self) -> dict[str, Tensor]:
        """Return the full weights, masters in fp32 (every rank must take part)."""
        state = canonical_state(self.model)
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}

    def _gathered_optimizer(self) -> dict[str, Tensor]:
        """Return the full optimizer state (every rank must take part)."""
        gathered: dict[str, Tensor] = {}
        for name, value in export_state(self._built, self._names).items():
            owner, _, slot = name.rpartition(".")
            gathered[name] = value if slot == "step" else self._full(owner, value)
        if self._train.precision == "bf16":
            gathered |= {f"{name}.master": self._full(name, shard) for name, shard in self._shards.items()}
        return gathered

    def _full(self, name: str, shard: Tensor) -> Tensor:
        like = self._parameters[name]
        whole: Tensor = DTensor.from_local(
            shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()
        return whole

    def _shard(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's rows of a full tensor, as FSDP cuts them."""
        rows = whole.chunk(self.world_size, dim=0)
        return rows[self.rank] if self.rank < len(rows) else whole[:0]

    def _take_over(self) -> None:
        """Cut what was loaded or gathered into this rank's shards."""
        cut: dict[str, Tensor] = {}
        for name, value in self._waiting.items():
            owner, _, slot = name.rpartition(".")
            cut[name] = value if slot == "step" else self._shard(owner, value)
        import_state(self._built, self._names, cut)
        for name, shard in self._shards.items():
            if f"{name}.master" in cut:
                shard.copy_(cut[f"{name}.master"])
        self._waiting = {}
