"""Engines: who owns gradients and optimizer, on how many processes. `torch` is one process or data parallel.

Micro-batches are dealt to the ranks in turn; gradients are summed over ranks while the last backward pass of a step
runs (`jobs.train.engines.buckets`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows, dealt
from jobs.train.engine import replicated_digest, replicated_weights
from jobs.train.engines.buckets import GradientSums
from jobs.train.freeze import apply_freeze
from jobs.train.optimizer import (
    assert_learning_rates,
    build_optimizer,
    export_state,
    freeze_tensors,
    import_masters,
    import_state,
    plan_groups,
    set_learning_rates,
    take_step,
)
from orchestrator.catalog.optimizers import MASTER, OPTIMIZERS
from orchestrator.spec.cell import TrainSpec


class TorchEngine:
    """Plain torch: the whole model and optimizer on every rank.

    Precisions: `fp32`; `mixed` and `fp16` (fp32 weights, autocast); `bf16` (bf16 weights and gradients, fp32 master
    weights and moments, gradients of micro-batches summed in fp32).
    """

    lockstep = False
    loss_scale = 1.0

    def __init__(self, model: CausalLM, train: TrainSpec, rank: int = 0, world_size: int = 1) -> None:
        self.model = model
        self.rank = rank
        self.world_size = world_size
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        self._roles = list(parameter_roles(model))
        self._parameters = {name: parameter for name, parameter, _ in self._roles}
        self._masters: dict[str, Tensor] = {
            name: p if dtype is torch.float32 else p.detach().float() for name, p in self._parameters.items()
        }
        self._separate = dtype is not torch.float32
        self._kind = OPTIMIZERS.get(train.optimizer)
        self.optimizer = build_optimizer(train, plan_groups(self._roles), self._masters)
        self._names = {id(tensor): name for name, tensor in self._masters.items()}
        self._trained: list[str] = list(self._parameters)
        self._turns = -(-train.accumulation // world_size)
        self._turn = 0
        self._group = dist.new_group() if world_size > 1 else None
        self._sums: GradientSums | None = None
        self._hooks: list[RemovableHandle] = []

    def freeze(self, frozen: str) -> None:
        names = apply_freeze(self.model, frozen)
        freeze_tensors(self.optimizer, (self._masters[name] for name in names))
        self._trained = [name for name in self._parameters if name not in names]
        self._turn = 0
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._group is None:
            return
        self._sums = GradientSums([self._masters[name] for name in self._trained], self._group)
        for position, name in enumerate(self._trained):
            arrived = partial(self._arrived, name, position)
            self._hooks.append(self._parameters[name].register_post_accumulate_grad_hook(arrived))

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self.optimizer, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self.optimizer, lr, router_lr)

    def backward(self, loss: Tensor) -> None:
        self._turn += 1
        loss.backward()
        if self._separate:
            for name in self._trained:
                self._widen(name)

    def _arrived(self, name: str, position: int, _: Tensor) -> None:
        """Hand a gradient over to be summed when the step's last backward pass of this rank has completed it."""
        if self._sums is not None and self._turn == self._turns:
            if self._separate:
                self._widen(name)
            self._sums.arrived(position)

    def _widen(self, name: str) -> None:
        """Add a parameter's gradient to its master's, in fp32."""
        gradient = self._parameters[name].grad
        if gradient is None:
            return
        master = self._masters[name]
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        self._parameters[name].grad = None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gradient_norm(self) -> Tensor:
        if self._sums is not None:
            self._sums.finish()
        gradients = self._gradients()
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm

    def step(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(self._gradients(), scale)
        take_step(self.optimizer)
        if self._separate:
            with torch.no_grad():
                for name in self._trained:
                    self._parameters[name].copy_(self._masters[name])
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self._turn = 0
        for name in self._trained:
            self._parameters[name].grad = None
            self._masters[name].grad = None

    def digest(self, names: Collection[str]) -> str:
        return replicated_digest(self.model, names)

    def weights(self) -> Iterator[tuple[str, Rows]]:
        return replicated_weights(self)

    def optimizer_tensors(self) -> dict[str, Rows]:
        tensors = export_state(self._kind, self.optimizer, self._names)
        if self._separate:
            tensors |= {f"{name}.{MASTER}": master for name, master in self._masters.items()}
        return {name: Rows.whole(value) for name, value in dealt(tensors, self.rank, self.world_size).items()}

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        import_state(self._kind, self.optimizer, self._names, tensors)
        if self._separate:
            import_masters(tensors, self._masters)

    def _gradients(self) -> list[Tensor]:
        gradients = (self._masters[name].grad for name in self._trained)
        return [gradient for gradient in gradients if gradient is not None]
