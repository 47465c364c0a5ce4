"""DeepSpeed ZeRO 1 and 2: optimizer state, and with 2 gradients, partitioned over ranks.

DeepSpeed reduces gradients and clips them; it steps `Pieces`, which hands every parameter's piece of a partition to the
optimizer of the other engines. So a freeze switch changes flags and nothing else (DeepSpeed would need another engine:
flipping `requires_grad` alone lets momentum go on), and what is stored are pieces as they lie: flat runs of elements.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.roles import parameter_roles
from jobs.models.shards import Rows
from jobs.models.weights import materialise
from jobs.train.engine import replicated_digest, replicated_weights
from jobs.train.freeze import apply_freeze
from jobs.train.optimizer import (
    GroupPlan,
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
from orchestrator.spec.cell import TrainSpec

# Elements of the buffers in which gradients are reduced.
BUCKET = 1 << 24

Settings = dict[str, Any]  # of deepspeed, or of a group of torch's optimizers


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a parameter in fp32: `tensor` lies at `offset` of its partition and at `start` of the whole."""

    partition: Tensor
    offset: int
    tensor: Tensor
    start: int


class Pieces(torch.optim.Optimizer):
    """What DeepSpeed steps partition by partition: the optimizer takes the step over their pieces."""

    def __init__(self, groups: list[Settings]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._optimizer: torch.optim.Optimizer | None = None
        self._of: dict[int, list[Piece]] = {}

    def bind(self, optimizer: torch.optim.Optimizer, pieces: Mapping[str, Piece]) -> None:
        """Name the optimizer that updates the pieces."""
        self._optimizer = optimizer
        for piece in pieces.values():
            self._of.setdefault(id(piece.partition), []).append(piece)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update the pieces of the partitions that DeepSpeed has put into the groups."""
        assert self._optimizer is not None, "bind() comes first"
        for group in self.param_groups:
            for partition in group["params"]:
                if partition.grad is None:
                    continue
                pieces = self._of.get(id(partition), [])
                for piece in pieces:
                    piece.tensor.grad = partition.grad[piece.offset : piece.offset + piece.tensor.numel()]
                take_step(self._optimizer)
                for piece in pieces:
                    piece.tensor.grad = None


class ZeroEngine:
    """DeepSpeed's engine over all parameters, whole on every rank."""

    lockstep = True
    stage = 2

    def __init__(
        self,
        model: CausalLM,
        train: TrainSpec,
        rank: int,
        world_size: int,
        weights: Mapping[str, Tensor],
        device: str = "cpu",
    ) -> None:
        """Fill an `empty_model` and partition what the stage partitions."""
        if world_size < 2:
            raise MoegridError("engine deepspeed needs two processes or more", hint="engine: torch runs on one")
        self.model, self.rank, self.world_size = model, rank, world_size
        self._train, self._device = train, device
        self._kind = OPTIMIZERS.get(train.optimizer)
        self._dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self._turns = -(-train.accumulation // world_size)
        self._turn = 0
        self.loss_scale = float(world_size)
        plans = plan_groups(parameter_roles(model))
        deepspeed = _deepspeed(device)
        self._fill(weights, deepspeed)
        self._parameters: dict[str, Any] = {name: parameter for name, parameter, _ in parameter_roles(model)}
        outer = Pieces([{"params": [self._parameters[name] for name in plan.names]} for plan in plans])
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=outer, config=self._config())
        # DeepSpeed casts the whole module; balancing biases, thresholds and rotary tables stay in fp32.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer
        self._pieces = dict(self._cut())
        self._masters = {name: piece.tensor for name, piece in self._pieces.items()}
        self._starts = {name: piece.start for name, piece in self._pieces.items()}
        self._names = {id(tensor): name for name, tensor in self._masters.items()}
        self._optimizer = build_optimizer(train, _held(plans, self._pieces), self._masters)
        outer.bind(self._optimizer, self._pieces)

    def freeze(self, frozen: str) -> None:
        names = apply_freeze(self.model, frozen)
        freeze_tensors(self._optimizer, (self._masters[name] for name in names if name in self._masters))
        self._turn = 0

    def set_lr(self, lr: float, router_lr: float) -> None:
        set_learning_rates(self._optimizer, lr, router_lr)

    def assert_lr(self, lr: float, router_lr: float) -> None:
        assert_learning_rates(self._optimizer, lr, router_lr)

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

    def weights(self) -> Iterator[tuple[str, Rows]]:
        return replicated_weights(self)

    def optimizer_tensors(self) -> dict[str, Rows]:
        state = export_state(self._kind, self._optimizer, self._names)
        if self._dtype is torch.bfloat16:
            state |= {f"{name}.{MASTER}": master for name, master in self._masters.items()}
        starts = {name: self._starts[_parameter(name)] for name in state}
        # A scalar is written by the rank that holds the parameter's first element.
        return {
            name: Rows(value, starts[name], (value.numel(),)) if value.dim() else Rows.whole(value, shared=True)
            for name, value in state.items()
            if value.dim() or not starts[name]
        }

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        import_state(self._kind, self._optimizer, self._names, tensors, self._starts)
        if self._dtype is torch.bfloat16:
            import_masters(tensors, self._masters, self._starts)

    def _fill(self, weights: Mapping[str, Tensor], deepspeed: ModuleType) -> None:
        """Give the model's parameters memory and values."""
        materialise(self.model, weights, self._device, lambda name: self._dtype)

    def _cut(self) -> Iterator[tuple[str, Piece]]:
        """Yield this rank's pieces as DeepSpeed laid them out."""
        zero = self._engine.optimizer
        for name, parameter in self._parameters.items():
            place = parameter._hp_mapping
            if place is not None:
                partition = zero.single_partition_of_fp32_groups[place.param_group_index]
                offset, length = place.hp_fragment_address.start, place.hp_fragment_address.numel
                tensor = partition.detach()[offset : offset + length]
                yield name, Piece(partition, offset, tensor, place.lp_fragment_address.start)

    def _config(self) -> Settings:
        return {
            "train_micro_batch_size_per_gpu": self._train.micro_batch,
            "gradient_accumulation_steps": self._turns,
            "gradient_clipping": self._train.clip,
            "bf16": {"enabled": self._dtype is torch.bfloat16},
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "contiguous_gradients": True,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                **self._partitioning(),
            },
            # torch's own AdamW, or another package's: DeepSpeed's would be compiled at the first start.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000_000,
        }

    def _partitioning(self) -> Settings:
        """Return the stage's own settings."""
        return {}


class ZeroOneEngine(ZeroEngine):
    """Stage 1: gradients are whole on every rank."""

    stage = 1


def _held(plans: tuple[GroupPlan, ...], pieces: Mapping[str, Piece]) -> list[GroupPlan]:
    """Return the plans over the parameters of which this rank has a piece."""
    return [
        GroupPlan(plan.name, plan.role, plan.decay, tuple(name for name in plan.names if name in pieces))
        for plan in plans
    ]


def _parameter(slot: str) -> str:
    return slot.rpartition(".")[0]


def _deepspeed(device: str) -> ModuleType:
    """Import DeepSpeed on the process group that exists already."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)  # its calls of older names, at every step
    # Its shared-memory collectives would be compiled at the first start, for minutes, under a lock that a kill leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    loaded: ModuleType = deepspeed
    return loaded
