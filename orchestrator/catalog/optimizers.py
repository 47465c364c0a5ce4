"""Optimizers: what each is called, its parameters, the state it keeps of every parameter, and where its code lies.

The code is a function `build(groups, train, parameters) -> torch.optim.Optimizer`. `groups` are torch's parameter
groups (`params`, `weight_decay`, `name`, `role`, `frozen`), to be passed on as they are; `train` is the phase's
TrainSpec, `parameters` the kind's own dataclass (None where it has none). The engine sets each group's `lr` before
every step, leaves out frozen groups, and saves and loads the state by the names that the declaration gives: a tensor
that is not named would not survive a resume, so that it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

MASTER = "master"


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """One optimizer.

    `slots` are tensors of a parameter's shape (moments), `scalars` tensors of no dimension (step counts), both by their
    names in `Optimizer.state`. `elementwise`: every element is updated by itself, so that a slice of a parameter can be
    updated alone, as sharding engines do. `reads` are the fields of a training phase that it uses besides the learning
    rates; others have no effect under it.
    """

    name: str
    code: str
    parameters: type | None = None
    slots: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    elementwise: bool = True
    reads: tuple[str, ...] = ("weight_decay",)
    version: int = 1

    def __post_init__(self) -> None:
        names = [*self.slots, *self.scalars]
        if MASTER in names or len(set(names)) < len(names) or any("." in name for name in names):
            raise MoegridError(
                f"optimizer {self.name!r} declares the states {', '.join(names)}",
                hint=f"each name once, without a dot, and not {MASTER!r}: that is the weights in full precision",
            )


BUILTINS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(
            "adamw",
            code="jobs.train.optimizer:adamw",
            slots=("exp_avg", "exp_avg_sq"),
            scalars=("step",),
            reads=("betas", "eps", "weight_decay"),
        )
    }
)
OPTIMIZERS = Registry("optimizers", "optimizer", OptimizerKind, BUILTINS)
# Fields that some optimizers read and others do not.
READ = ("betas", "eps", "weight_decay")
