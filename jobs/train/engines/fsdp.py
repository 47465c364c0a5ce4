"""FSDP2: weights, gradients and optimizer state sharded over ranks along each parameter's first dimension.

The model is built on the meta device and sharded there; every rank gives its own rows memory and reads them alone. With
expert parallelism routed experts are dealt to the ranks of a group first, and what a rank has of them is sharded among
those that have the same.
Freezing changes flags of the same sharded model and skips rows in the same optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows, digest_bytes, digest_text, rows_digest
from jobs.models.weights import canonical_state, load_canonical, replace_parameters, state_rows
from jobs.train.engines.mesh import lay_out
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
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import ONE_COPY, Parallel, TrainSpec


class FsdpEngine:
    """Sharded fp32 weights and moments; with `bf16` they are the masters of weights that are gathered in bf16."""

    lockstep = True
    loss_scale = 1.0

    def __init__(
        self,
        model: CausalLM,
        train: TrainSpec,
        rank: int,
        world_size: int,
        weights: Mapping[str, Tensor],
        device: str = "cpu",
        parallel: Parallel = ONE_COPY,
    ) -> None:
        """Shard an `empty_model` and read this rank's rows of `weights`."""
        if world_size < 2:
            raise MoegridError("engine fsdp needs two processes or more", hint="engine: torch runs on one")
        self.model, self.rank, self.world_size = model, rank, world_size
        self._half = torch.bfloat16 if train.precision == "bf16" else None
        self._kind = OPTIMIZERS.get(train.optimizer)
        self._device, self._mesh = device, lay_out(device, world_size, parallel)
        policy = MixedPrecisionPolicy(param_dtype=self._half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if self._mesh.group is not None:
            for block in model.moe_blocks:
                block.experts.deal(self._mesh.group)
                fully_shard(block.experts, mesh=self._mesh.experts, mp_policy=policy)
        # FSDP2 cuts no scalar: each rank holds it, and sums its gradient once a step.
        scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
        for layer in model.all_layers:
            fully_shard(layer, mesh=self._mesh.whole, mp_policy=policy, ignored_params=scalars)
        fully_shard(model, mesh=self._mesh.whole, mp_policy=policy, ignored_params=scalars)
        for module in self._modules():
            # Gradients are sums, not means: of dealt experts those over a group have come with its tokens already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._materialise(weights)
        roles = list(parameter_roles(model))
        self._parameters: dict[str, Any] = {name: parameter for name, parameter, _ in roles}
        self._rows = state_rows(model, self._parameters)
        self._shards = {name: piece.tensor.detach() for name, piece in self._rows.items()}
        self._starts = {name: piece.first * math.prod(piece.shape[1:]) for name, piece in self._rows.items()}
        self._names = {id(shard): name for name, shard in self._shards.items()}
        self._optimizer = build_optimizer(train, plan_groups(roles), self._shards, self._rows, self._mesh.pieces)
        self._trained = list(self._parameters)

    def freeze(self, frozen: str) -> None:
        for module in self._modules():
            module.reshard()  # the flags of the shards are those that count
        names = apply_freeze(self.model, frozen)
        for group in self._groups():
            # Of a group without any trained parameter FSDP2 did not note the types at its first forward pass.
            group._init_mp_dtypes()
        self._trained = [name for name in self._parameters if name not in names]
        freeze_tensors(self._optimizer, (self._shards[name] for name in names))
        for name in names:
            self._shards[name].grad = None

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self._optimizer, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self._optimizer, lr, router_lr)

    def backward(self, loss: Tensor) -> None:
        # Each micro-batch's gradients are reduced at once: kept until the last one they would take the whole model's on
        # every rank.
        loss.backward()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gradient_norm(self) -> Tensor:
        cut, scalars = [], []
        for name in self._trained:
            gradient = self._parameters[name].grad
            if isinstance(gradient, DTensor):
                cut.append(gradient.to_local())
                self._shards[name].grad = cut[-1]
            elif gradient is not None:
                scalars.append(gradient)
                self._shards[name].grad = gradient
        square = torch.stack(torch._foreach_norm(cut)).square().sum()
        dist.all_reduce(square, group=self._mesh.pieces)
        if scalars:
            together = torch.stack(scalars)
            dist.all_reduce(together)
            torch._foreach_copy_(scalars, list(together.unbind()))
            square += together.square().sum()
        return square.sqrt()

    def step(self, scale: float) -> None:
        if scale != 1.0:
            torch._foreach_mul_(self._gradients(), scale)
        take_step(self._optimizer)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for name in self._trained:
            self._parameters[name].grad = self._shards[name].grad = None

    def digest(self, names: Collection[str]) -> str:
        wanted = set(names)
        cut, copied = self._split({name: t for name, t in canonical_state(self.model).items() if name in wanted})
        own = torch.tensor(list(digest_bytes(rows_digest(cut))), dtype=torch.uint8, device=self._device)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        # Of what every rank holds each proves its own.
        shared = rows_digest({name: Rows.whole(tensor) for name, tensor in copied.items()})
        return digest_text([*(int.from_bytes(part.tolist(), "big") for part in parts), shared])

    def weights(self) -> Iterator[tuple[str, Rows]]:
        cut, copied = self._split(canonical_state(self.model))
        yield from cut.items()
        for name, tensor in copied.items() if self.rank == 0 else ():
            yield name, Rows.whole(tensor, shared=True)

    def optimizer_tensors(self) -> dict[str, Rows]:
        state = export_state(self._kind, self._optimizer, self._names)
        if self._half:
            state |= {f"{name}.{MASTER}": shard for name, shard in self._shards.items()}
        scalars = {name: value for name, value in state.items() if not value.dim()}
        pieces = {
            name: self._share(replace(self._rows[name.rpartition(".")[0]], tensor=value))
            for name, value in state.items()
            if name not in scalars
        }
        own = scalars if self.rank == 0 else {}
        shared = {name: Rows.whole(value, shared=True) for name, value in own.items()}
        return {name: piece for name, piece in pieces.items() if len(piece.tensor)} | shared

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        import_state(self._kind, self._optimizer, self._names, tensors, self._starts)
        if self._half:
            import_masters(tensors, self._shards, self._starts)

    def _materialise(self, weights: Mapping[str, Tensor]) -> None:
        """Give this rank's rows memory and values."""

        def rows(name: str, old: nn.Parameter) -> nn.Parameter:
            if not isinstance(old, DTensor):
                return nn.Parameter(torch.empty_like(old, device=self._device))
            local = torch.empty_like(old.to_local(), device=self._device)
            mesh, cut = old.device_mesh, old.placements
            own = DTensor.from_local(local, mesh, cut, run_check=False, shape=old.shape, stride=old.stride())
            return nn.Parameter(own)

        replace_parameters(self.model, rows)
        for group in self._groups():
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()
        load_canonical(self.model, weights)

    def _modules(self) -> Iterator[FSDPModule]:
        return (module for module in self.model.modules() if isinstance(module, FSDPModule))

    def _groups(self) -> Iterator[Any]:
        """Return FSDP2's own record of every parameter group that it gathers as one."""
        for module in self._modules():
            yield from module._get_fsdp_state()._fsdp_param_groups

    def _split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Rows], dict[str, Tensor]]:
        """Return (this rank's rows of what is sharded, what every rank holds) of a canonical state."""
        cut, copied = {}, {}
        for name, piece in state_rows(self.model, state).items():
            if piece.tensor is state[name]:
                copied[name] = piece.tensor
            elif len((share := self._share(piece)).tensor):
                cut[name] = replace(share, dtype=self._half)
        return cut, copied

    def _share(self, piece: Rows) -> Rows:
        """Return those of a rank's rows that it writes and proves, where other copies of the model hold them too."""
        each = -(-len(piece.tensor) // self._mesh.copies)
        first = self._mesh.copy * each
        return replace(piece, tensor=piece.tensor[first : first + each], first=piece.first + first)

    def _gradients(self) -> list[Tensor]:
        gradients = (self._shards[name].grad for name in self._trained)
        return [gradient for gradient in gradients if gradient is not None]
