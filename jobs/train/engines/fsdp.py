"""FSDP2: weights, gradients and optimizer state sharded over ranks along each parameter's first dimension.

Every freeze phase gets a freshly sharded model: FSDP2 keeps the `requires_grad` that a parameter had when it was first
gathered. Weights are carried over parameter by parameter; every rank writes its own rows to the store, and cuts them
from what it loads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows, dealt, digest_bytes, digest_text, rows_digest
from jobs.models.weights import canonical_state, load_canonical
from jobs.train.freeze import apply_freeze
from jobs.train.optimizer import (
    assert_learning_rates,
    build_optimizer,
    export_state,
    freeze_tensors,
    import_state,
    plan_groups,
    set_learning_rates,
    take_step,
)
from orchestrator.catalog.optimizers import MASTER, OPTIMIZERS
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
        self._kind = OPTIMIZERS.get(train.optimizer)
        self._frozen: str | None = None
        self._turns = -(-train.accumulation // world_size)
        self._turn = 0
        self.loss_scale = float(world_size)
        self._optimizer: torch.optim.Optimizer | None = None
        self._waiting: Mapping[str, Tensor] = {}
        device = next(model.parameters()).device.type
        self._mesh = init_device_mesh(device, (world_size,))

    def freeze(self, frozen: str) -> None:
        if frozen == self._frozen:
            return
        rows: dict[str, Tensor] = {}
        if self._optimizer is not None:
            rows = self._optimizer_rows()
            device = next(self.model.parameters()).device
            fresh = build_model(self.model.spec, int(self.model.config.vocab_size)).to(device)
            load_canonical(fresh, self._gathered_weights())
            self.model = fresh
        self._frozen = frozen
        names = apply_freeze(self.model, frozen)
        half = torch.bfloat16 if self._train.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in self.model.layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=policy)
        fully_shard(self.model, mesh=self._mesh, mp_policy=policy)
        roles = list(parameter_roles(self.model))
        self._parameters: dict[str, Any] = {name: parameter for name, parameter, _ in roles}
        self._trained = [name for name in self._parameters if name not in names]
        self._shards = {name: parameter.to_local().detach() for name, parameter in self._parameters.items()}
        self._names = {id(shard): name for name, shard in self._shards.items()}
        self._optimizer = build_optimizer(self._train, plan_groups(roles), self._shards)
        freeze_tensors(self._optimizer, (self._shards[name] for name in names))
        self._import(rows or self._cut(self._waiting))
        self._waiting = {}

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self._built, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self._built, lr, router_lr)

    def backward(self, loss: Tensor) -> None:
        self._turn += 1
        self.model.set_requires_gradient_sync(self._turn == self._turns)  # type: ignore[operator]
        # FSDP averages over ranks; the loss is already every micro-batch's share of one sum.
        (loss * self.loss_scale).backward()

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
        take_step(self._built)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self._turn = 0
        for name in self._trained:
            self._parameters[name].grad = self._shards[name].grad = None

    def digest(self, names: Collection[str]) -> str:
        wanted = set(names)
        cut, copied = self._split({name: t for name, t in canonical_state(self.model).items() if name in wanted})
        own = torch.tensor(list(digest_bytes(rows_digest(cut))), dtype=torch.uint8, device=self._mesh.device_type)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        # Of what every rank holds each proves its own.
        shared = rows_digest({name: Rows.whole(tensor) for name, tensor in copied.items()})
        return digest_text([*(int.from_bytes(part.tolist(), "big") for part in parts), shared])

    def weights(self) -> dict[str, Rows]:
        cut, copied = self._split(canonical_state(self.model))
        return cut | {name: Rows.whole(t) for name, t in dealt(copied, self.rank, self.world_size).items()}

    def _split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Rows], dict[str, Tensor]]:
        """Return (this rank's rows of what is sharded, what every rank holds) of a canonical state."""
        half = self._train.precision == "bf16"
        cut, copied = {}, {}
        for name, tensor in state.items():
            if not isinstance(tensor, DTensor):
                copied[name] = tensor
            elif len(local := tensor.to_local()):
                first = self.rank * -(-len(tensor) // self.world_size)
                cut[name] = Rows(local.bfloat16() if half else local, first, tuple(tensor.shape))
        return cut, copied

    def optimizer_tensors(self) -> dict[str, Tensor]:
        state = self._optimizer_rows()
        scalars = {name: value for name, value in state.items() if name.rpartition(".")[2] in self._kind.scalars}
        rows = {name: value for name, value in state.items() if name not in scalars and len(value)}
        return rows | dealt(scalars, self.rank, self.world_size)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        if self._optimizer is None:
            self._waiting = tensors
        else:
            self._import(self._cut(tensors))

    @property
    def _built(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None, "freeze() comes first"
        return self._optimizer

    def _gradients(self) -> list[Tensor]:
        gradients = (self._shards[name].grad for name in self._trained)
        return [gradient for gradient in gradients if gradient is not None]

    def _gathered_weights(self) -> dict[str, Tensor]:
        """Return the full weights, masters in fp32 (every rank must take part)."""
        state = canonical_state(self.model)
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}

    def _optimizer_rows(self) -> dict[str, Tensor]:
        """Return this rank's rows of the optimizer state, and every scalar."""
        rows = export_state(self._kind, self._built, self._names)
        if self._train.precision == "bf16":
            rows |= {f"{name}.{MASTER}": shard for name, shard in self._shards.items()}
        return rows

    def _cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's rows of full tensors, as FSDP cuts them."""
        rows: dict[str, Tensor] = {}
        for name, whole in tensors.items():
            chunks = whole.chunk(self.world_size) if whole.dim() else (whole,) * self.world_size
            rows[name] = chunks[self.rank].clone() if self.rank < len(chunks) else whole[:0]
        return rows

    def _import(self, rows: Mapping[str, Tensor]) -> None:
        """Fill the optimizer with this rank's rows."""
        import_state(self._kind, self._built, self._names, rows)
        for name, shard in self._shards.items():
            if f"{name}.{MASTER}" in rows:
                shard.copy_(rows[f"{name}.{MASTER}"])
