"""A package with an optimizer of its own, Lion (arXiv 2302.06675), and a freeze rule that splits parameter groups."""

from __future__ import annotations

LION = """
from dataclasses import dataclass

from orchestrator.catalog.freezing import FreezeRule
from orchestrator.catalog.optimizers import OptimizerKind


@dataclass(frozen=True)
class LionParameters:
    fast: float = 0.9
    slow: float = 0.99
    nesterov: bool = False

    def __post_init__(self):
        if self.fast > self.slow:
            raise ValueError(f"fast {self.fast} is above slow {self.slow}")


def lion(groups, train, parameters):
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for tensor in group["params"]:
                    if tensor.grad is None:
                        continue
                    state = self.state[tensor]
                    if not state:
                        state["momentum"] = torch.zeros_like(tensor)
                        state["taken"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
                    state["taken"] += 1
                    momentum = state["momentum"]
                    update = (momentum * parameters.fast + tensor.grad * (1 - parameters.fast)).sign_()
                    tensor.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                    momentum.mul_(parameters.slow).add_(tensor.grad, alpha=1 - parameters.slow)

    return Lion(groups, {"lr": train.lr})


LION = OptimizerKind(
    "lion", code="lions:lion", parameters=LionParameters, slots=("momentum",), scalars=("taken",), version=3
)
WHOLE = OptimizerKind("whole", code="lions:lion", elementwise=False)


def lower(name, role, model):
    return ".layers.0." in name


LOWER = FreezeRule("lower", ("router",), code="lions:lower")
GONE = OptimizerKind("gone", code="lions:no_such")
"""
NAMES = {
    "optimizers": {name: f"lions:{name.upper()}" for name in ("lion", "whole", "gone")},
    "freezing": {"lower": "lions:LOWER"},
}
