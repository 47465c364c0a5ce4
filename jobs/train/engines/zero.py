"""DeepSpeed ZeRO 1 and 2: optimizer state, and with 2 gradients, partitioned over ranks.

Flipping `requires_grad` under DeepSpeed does not freeze (momentum goes on), and its checkpoints fit one grouping and
one world size. So every phase gets an engine over its trainable parameters alone, and the optimizer's state is carried
from one to the next, and to and from the store, parameter by parameter in full precision.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows, dealt
from jobs.train.engine import replicated_digest, replicated_weights
from jobs.train.freeze import apply_freeze
from jobs.train.optimizer import (
    GroupPlan,
    assert_learning_rates,
    build_optimizer,
    check_slot,
    plan_groups,
    set_learning_rates,
)
from orchestrator.catalog.optimizers import MASTER, OPTIMIZERS
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import TrainSpec


class ZeroEngine:
    """DeepSpeed's engine over the parameters that are being trained; `_kept` is the full state of the others."""

    lockstep = True

    def __init__(self, model: CausalLM, train: TrainSpec, rank: int, world_size: int, stage: int) -> None:
        if world_size < 2:
            raise MoegridError("engine deepspeed needs two processes or more", hint="engine: torch runs on one")
        self.model, self.rank, self.world_size = model, rank, world_size
        self._train = train
        self._kind = OPTIMIZERS.get(train.optimizer)
        self._stage = stage
        self._dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self._dtype)
        self._roles = list(parameter_roles(model))
        self._parameters = {name: parameter for name, parameter, _ in self._roles}
        self._plans: tuple[GroupPlan, ...] = ()
        self._kept: dict[str, Tensor] = {}
        self._frozen: str | None = None
        self._turns = -(-train.accumulation // world_size)
        self._turn = 0
        self.loss_scale = float(world_size)
        self._engine: Any = None

    def freeze(self, frozen: str) -> None:
        if frozen == self._frozen:
            return
        if self._engine is not None:
            self._kept |= self._gather()
            self._engine.destroy()
        self._frozen = frozen
        names = apply_freeze(self.model, frozen)
        self._plans = plan_groups(item for item in self._roles if item[0] not in names)
        optimizer = build_optimizer(self._train, self._plans, self._parameters)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        deepspeed = _deepspeed(next(self.model.parameters()).device.type)
        self._engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=self._config())
        # DeepSpeed casts the whole module; balancing biases, thresholds and rotary tables stay in fp32.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer
        self._restore()

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self._engine.optimizer, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self._engine.optimizer, lr, router_lr)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already every micro-batch's share of one sum.
        self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)
        self._turn += 1
        if self._turn < self._turns:
            self._engine.step()  # counts the micro-batch, changes nothing before the last one

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def gradient_norm(self) -> Tensor:
        norm = torch.as_tensor(self._engine.optimizer.scaled_global_norm())
        return torch.where(norm < 0, torch.full_like(norm, float("nan")), norm)  # -1 is its sign for not finite

    def step(self, scale: float) -> None:
        self._engine.step()  # clips by the same rule
        self._turn = 0

    def drop_gradients(self) -> None:
        self._engine.optimizer.zero_grad()
        self._turn = 0

    def digest(self, names: Collection[str]) -> str:
        return replicated_digest(self.model, names)

    def weights(self) -> dict[str, Rows]:
        return replicated_weights(self)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = self._kept | self._gather()
        return dealt(tensors, self.rank, self.world_size)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        self._kept = dict(tensors)
        if self._engine is not None:
            self._restore()

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self._train.micro_batch,
            "gradient_accumulation_steps": self._turns,
            "gradient_clipping": self._train.clip,
            "bf16": {"enabled": self._dtype is torch.bfloat16},
            "zero_optimization": {"stage": self._stage, "overlap_comm": False, "contiguous_gradients": True},
            # torch's own AdamW, or another package's: DeepSpeed's would be compiled at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000_000,
        }

    def _partitions(self) -> list[Tensor]:
        return [group["params"][0] for group in self._engine.optimizer.optimizer.param_groups]

    def _gather(self) -> dict[str, Tensor]:
        """Return the full optimizer state of the trained parameters (every rank must take part)."""
        states = self._engine.optimizer.optimizer.state
        self._link()
        gathered: dict[str, Tensor] = {}
        for plan, partition in zip(self._plans, self._partitions(), strict=True):
            for name in plan.names:
                parameter: Any = self._parameters[name]
                if self._dtype is torch.bfloat16:
                    gathered[f"{name}.{MASTER}"] = parameter.get_full_hp_param()
                for slot, value in sorted(states.get(partition, {}).items()):
                    check_slot(self._kind, slot, value, partition)
                    shaped = slot in self._kind.slots
                    gathered[f"{name}.{slot}"] = parameter.get_full_hp_param(slot) if shaped else value.clone()
        return gathered

    def _link(self) -> None:
        """Tell every parameter where its moments lie (DeepSpeed does so after the first group's first step only)."""
        states = self._engine.optimizer.optimizer.state
        for plan, partition in zip(self._plans, self._partitions(), strict=True):
            for name in plan.names:
                mapping = getattr(self._parameters[name], "_hp_mapping", None)
                if mapping is not None and partition in states:
                    mapping.set_optim_state_fragment(partition, states[partition])

    def _restore(self) -> None:
        """Move what `_kept` holds of the trained parameters into the partitions."""
        zero = self._engine.optimizer
        for plan, partition in zip(self._plans, self._partitions(), strict=True):
            first = plan.names[0]
            scalars = {slot: f"{first}.{slot}" for slot in self._kind.scalars if f"{first}.{slot}" in self._kept}
            slots = [slot for slot in self._kind.slots if f"{first}.{slot}" in self._kept]
            if scalars or slots:
                zero.optimizer.state[partition] = {
                    **{slot: self._kept[name].clone() for slot, name in scalars.items()},
                    **{slot: torch.zeros_like(partition) for slot in slots},
                }
        self._link()
        for plan in self._plans:
            for name in plan.names:
                parameter: Any = self._parameters[name]
                for slot in (*self._kind.slots, MASTER):
                    value = self._kept.pop(f"{name}.{slot}", None)
                    if value is not None:
                        parameter.set_full_hp_param(value.to(parameter.device), None if slot == MASTER else slot)
                for slot in self._kind.scalars:
                    self._kept.pop(f"{name}.{slot}", None)


def stage_1(model: CausalLM, train: TrainSpec, rank: int, world_size: int) -> ZeroEngine:
    """Return the engine that partitions the optimizer's state."""
    return ZeroEngine(model, train, rank, world_size, stage=1)


def stage_2(model: CausalLM, train: TrainSpec, rank: int, world_size: int) -> ZeroEngine:
    """Return the engine that partitions gradients as well."""
    return ZeroEngine(model, train, rank, world_size, stage=2)


def _deepspeed(device: str) -> Any:
    """Import DeepSpeed on the process group that exists already."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    # Its shared-memory collectives would be compiled at the first start, for minutes, under a lock that a kill leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    return deepspeed
