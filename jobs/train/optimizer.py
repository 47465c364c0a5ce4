"""Optimizers with one parameter group per module role, and groups that can be frozen without being rebuilt."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jobs.models.shards import Rows, elements
from orchestrator.catalog.optimizers import MASTER, OPTIMIZERS, OptimizerKind
from orchestrator.catalog.parameters import made
from orchestrator.errors import MoegridError, NumericsError
from orchestrator.registry import load
from orchestrator.spec.cell import TrainSpec

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The parameters of one role with one decay rule, by name, in the model's order."""

    name: str
    role: str
    decay: bool
    names: tuple[str, ...]


def plan_groups(parameters: Iterable[tuple[str, nn.Parameter, str]]) -> tuple[GroupPlan, ...]:
    """Group (name, parameter, role) by role and by decay: matrices decay, vectors (norms, biases) do not."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, parameter, role in parameters:
        groups.setdefault((role, parameter.ndim >= 2), []).append(name)
    return tuple(
        GroupPlan(f"{role}.{'matrices' if decay else 'vectors'}", role, decay, tuple(names))
        for (role, decay), names in sorted(groups.items())
    )


# torch's marks that keep a compiler off a method import the compiler when it is first called: two seconds of a start.
for _marked in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    setattr(torch.optim.Optimizer, _marked, inspect.unwrap(getattr(torch.optim.Optimizer, _marked)))


class AdamW(torch.optim.AdamW):
    """torch's AdamW with a step that imports no compiler."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(groups: list[dict[str, Any]], train: TrainSpec, parameters: None) -> torch.optim.Optimizer:
    """Return AdamW, fused."""
    return AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def build_optimizer(
    train: TrainSpec,
    plans: Iterable[GroupPlan],
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, Rows] = MappingProxyType({}),
    ranks: dist.ProcessGroup | None = None,
) -> torch.optim.Optimizer:
    """Return the phase's optimizer over `tensors` (by parameter name), one group per plan, nothing frozen.

    Where `tensors` are `rows` of parameters, `ranks` hold all of them together.
    """
    plans = list(plans)
    groups: list[dict[str, object]] = [
        {
            "params": [tensors[name] for name in plan.names],
            "names": list(plan.names),
            "name": plan.name,
            "role": plan.role,
            "frozen": frozenset(),
            "weight_decay": train.weight_decay if plan.decay else 0.0,
        }
        for plan in plans
    ]
    if ranks is not None:
        for group, plan in zip(groups, plans, strict=True):
            group["whole_rows"] = [(rows[name].shape or (0,))[0] for name in plan.names]
            group["ranks"] = ranks
    kind = OPTIMIZERS.get(train.optimizer)
    parameters = made(kind, train.optimizer_parameters)
    optimizer: torch.optim.Optimizer = load(kind.code, OPTIMIZERS.who(kind.name))(groups, train, parameters)
    return optimizer


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Update what is not frozen.

    A frozen parameter gets no update and no weight decay; its state stays, and training it again continues from there.
    """
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]
    for group in groups:
        group["params"] = [tensor for tensor in group["params"] if id(tensor) not in group["frozen"]]
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        for group, tensors in zip(groups, whole, strict=True):
            group["params"] = tensors


def freeze_tensors(optimizer: torch.optim.Optimizer, frozen: Iterable[Tensor]) -> None:
    """Keep `frozen` as they are in the steps to come, and train all others."""
    ids = frozenset(map(id, frozen))
    for group in optimizer.param_groups:
        group["frozen"] = ids.intersection(map(id, group["params"]))


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, router_lr: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = router_lr if group["role"] == "router" else lr


def assert_learning_rates(optimizer: torch.optim.Optimizer, lr: float, router_lr: float) -> None:
    """Raise NumericsError unless every group has the learning rate that its role calls for."""
    for group in optimizer.param_groups:
        wanted = router_lr if group["role"] == "router" else lr
        if group["lr"] != wanted:
            raise NumericsError(
                f"optimizer group {group['name']} has learning rate {group['lr']} instead of {wanted}",
                cause="the training engine did not take over the learning rates after a load",
                hint="report this engine; `engine: torch` is not affected",
            )


def export_state(kind: OptimizerKind, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter>.<slot>`, in the order of groups and parameters, not copied.

    `names` maps `id(tensor)` to the parameter's name. A parameter that was never updated has no entry.
    """
    exported: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            for slot, value in sorted(optimizer.state.get(tensor, {}).items()):
                check_slot(kind, slot, value, tensor)
                exported[f"{names[id(tensor)]}.{slot}"] = value
    return exported


def check_slot(kind: OptimizerKind, slot: str, value: Any, tensor: Tensor) -> None:
    """Raise MoegridError when an optimizer keeps something of a parameter that its kind does not declare."""
    shape = tensor.shape if slot in kind.slots else torch.Size() if slot in kind.scalars else None
    sound = shape is not None and isinstance(value, Tensor) and value.shape == shape
    if not sound or (slot in kind.slots and value.dtype != tensor.dtype):
        what = f"{value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
        raise MoegridError(
            f"optimizer {kind.name!r} keeps {slot!r} ({what}) of a parameter ({tensor.dtype}, shape "
            f"{tuple(tensor.shape)})",
            cause="what is not declared, or no tensor, would be lost when training resumes",
            hint="declare it in OptimizerKind: slots are tensors like the parameter, scalars tensors of no dimension",
        )


def import_state(
    kind: OptimizerKind,
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    starts: Mapping[str, int] | None = None,
) -> None:
    """Fill the optimizer with copies of `export_state`'s tensors; what is absent was never updated.

    `starts` says by parameter at which element of the whole the optimizer's own piece of it begins (default: 0).
    """
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            name = names[id(tensor)]
            start = starts[name] if starts else 0
            # A fused optimizer keeps its step counts beside the parameters.
            state = {
                slot: elements(tensors, f"{name}.{slot}", start, tensor.numel())
                .to(tensor.device, copy=True)
                .view(tensor.shape)
                for slot in kind.slots
                if f"{name}.{slot}" in tensors
            }
            state |= {
                slot: tensors[f"{name}.{slot}"].to(tensor.device, copy=True)
                for slot in kind.scalars
                if f"{name}.{slot}" in tensors
            }
            if state:
                optimizer.state[tensor] = state


def import_masters(
    tensors: Mapping[str, Tensor], masters: Mapping[str, Tensor], starts: Mapping[str, int] | None = None
) -> None:
    """Copy the fp32 master weights in, of each parameter the piece that `masters` holds."""
    with torch.no_grad():
        for name, master in masters.items():
            start = starts[name] if starts else 0
            master.copy_(elements(tensors, f"{name}.{MASTER}", start, master.numel()).view(master.shape))
