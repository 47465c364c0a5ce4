"""An optimizer: Lion (Chen et al. 2023), whose state is one tensor a parameter, declared as its slot."""

from __future__ import annotations

from typing import Any

import torch

from moegrid_example.declarations import Lion


class LionOptimizer(torch.optim.Optimizer):
    """theta <- theta - lr (sign(fast m + (1 - fast) g) + decay theta); m <- slow m + (1 - slow) g."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                update = torch.lerp(parameter.grad, momentum, group["fast"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.lerp_(parameter.grad, 1 - group["slow"])


def lion(groups: list[dict[str, Any]], train: Any, parameters: Lion) -> torch.optim.Optimizer:
    """Return Lion over torch's parameter groups, which are passed on as they are."""
    return LionOptimizer(groups, {"lr": train.lr, "fast": parameters.fast, "slow": parameters.slow})
