"""AdamW with one parameter group per module role, and groups that can be frozen without being rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import NumericsError
from orchestrator.spec.cell import TrainSpec

# What a freeze schedule's word freezes, as module roles.
FROZEN_ROLES: dict[str, tuple[str, ...]] = {
    "": (),
    "router": ("router",),
    "expert": ("routed_expert", "shared_expert"),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


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


class FreezableAdamW(torch.optim.AdamW):
    """AdamW whose groups with `frozen` set are not touched at all.

    A frozen group gets no update and no weight decay; its moments and per-parameter step counts stay, and training it
    again continues from them.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the groups that are not frozen."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["frozen"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def build_optimizer(train: TrainSpec, plans: Iterable[GroupPlan], tensors: Mapping[str, Tensor]) -> FreezableAdamW:
    """Return the optimizer over `tensors` (by parameter name), one group per plan, nothing frozen."""
    groups = [
        {
            "params": [tensors[name] for name in plan.names],
            "name": plan.name,
            "role": plan.role,
            "frozen": False,
            "weight_decay": train.weight_decay if plan.decay else 0.0,
        }
        for plan in plans
    ]
    return FreezableAdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def freeze_groups(optimizer: torch.optim.Optimizer, frozen: str) -> None:
    """Mark the groups that the schedule's word `frozen` ("" = none) freezes."""
    for group in optimizer.param_groups:
        group["frozen"] = group["role"] in FROZEN_ROLES[frozen]


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


def export_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter>.<slot>`, in the order of groups and parameters, not copied.

    `names` maps `id(tensor)` to the parameter's name. A parameter that was never updated has no entry.
    """
    exported: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            for slot, value in sorted(optimizer.state.get(tensor, {}).items()):
                exported[f"{names[id(tensor)]}.{slot}"] = value
    return exported


def import_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> None:
    """Fill the optimizer with copies of `export_state`'s tensors; what is absent was never updated."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            name = names[id(tensor)]
            state: dict[str, Tensor] = {}
            for slot in MOMENTS:
                if f"{name}.{slot}" in tensors:
                    state[slot] = torch.empty_like(tensor).copy_(tensors[f"{name}.{slot}"])
            if f"{name}.step" in tensors:
                # A fused optimizer keeps its step counts beside the parameters.
                count = torch.empty((), dtype=torch.float32, device=tensor.device)
                state["step"] = count.copy_(tensors[f"{name}.step"])
            if state:
                optimizer.state[tensor] = state
