"""Optimizers: what each is called, its parameters, the state it keeps of every parameter, and where its code lies.

The code is a function `build(groups, train, parameters) -> torch.optim.Optimizer`. `groups` are torch's parameter
groups (`params`, their `names`, `weight_decay`, `name`, `role`, `frozen`), to be passed on as they are; `train` is the
phase's TrainSpec, `parameters` the kind's own dataclass (None where it has none). The engine sets each group's `lr`
before every step, leaves out frozen groups, and saves and loads the state by the names that the declaration gives: a
tensor that is not named would not survive a resume, so that it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

MASTER = "master"


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """One optimizer.

    `slots` are tensors of a parameter's shape (moments), `scalars` tensors of no dimension (step counts), both by their
    names in `Optimizer.state`; of a parameter of a role in `held_by` so many slots are kept, of others all.
    `elementwise`: every element is updated by itself, so that a slice of a parameter can be updated alone, as sharding
    engines do. `by_rows`: if not, runs of a parameter's rows along its first dimension can be, together with the other
    ranks that hold some: an engine that cuts so gives each group `whole_rows`, how many rows each parameter has (in the
    order of `params`; 0 = a scalar), and `ranks`, the process group that holds all of them, each a run as torch.chunk
    has it. `reads` are the fields of a training phase that it uses besides the learning rates; others have no
    effect under it.
    """

    name: str
    code: str
    parameters: type | None = None
    slots: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    held_by: Mapping[str, int] = field(default_factory=dict)
    elementwise: bool = True
    by_rows: bool = False
    reads: tuple[str, ...] = ("weight_decay",)
    version: int = 1

    def __post_init__(self) -> None:
        names = [*self.slots, *self.scalars]
        if MASTER in names or len(set(names)) < len(names) or any("." in name for name in names):
            raise MoegridError(
                f"optimizer {self.name!r} declares the states {', '.join(names)}",
                hint=f"each name once, without a dot, and not {MASTER!r}: that is the weights in full precision",
            )

    def held(self, role: str) -> int:
        """Return how many tensors of its shape are kept of a parameter of a role."""
        return self.held_by.get(role, len(self.slots))


@dataclass(frozen=True, slots=True)
class Muon:
    """Muon for matrices of hidden layers (each expert's by itself), AdamW for embeddings, head, router and vectors.

    `adjust`: `rms` scales updates to AdamW's size, so that its learning rates serve; `original` is by the matrix's
    shape alone (then `lr` is Muon's, and `adamw_lr_ratio` what AdamW's is of it).
    """

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    adjust: str = "rms"
    adamw_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum:g}")
        if not 1 <= self.newton_schulz_steps < 100:
            raise ValueError(f"newton_schulz_steps must be 1 to 99, not {self.newton_schulz_steps}")
        if self.adjust not in ("rms", "original"):
            raise ValueError(f"adjust must be rms or original, not {self.adjust!r}")
        if not self.adamw_lr_ratio > 0:
            raise ValueError(f"adamw_lr_ratio must be above 0, not {self.adamw_lr_ratio:g}")


BUILTINS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(
            "adamw",
            code="jobs.train.optimizer:adamw",
            slots=("exp_avg", "exp_avg_sq"),
            scalars=("step",),
            reads=("betas", "eps", "weight_decay"),
        ),
        "muon": OptimizerKind(
            "muon",
            code="jobs.train.muon:muon",
            parameters=Muon,
            slots=("momentum_buffer", "exp_avg", "exp_avg_sq"),
            scalars=("step",),
            held_by={"attention": 1, "routed_expert": 1, "shared_expert": 1, "embedding": 2, "router": 2, "other": 2},
            elementwise=False,
            by_rows=True,
            reads=("betas", "eps", "weight_decay"),
        ),
    }
)
OPTIMIZERS = Registry("optimizers", "optimizer", OptimizerKind, BUILTINS)
# Fields that some optimizers read and others do not.
READ = ("betas", "eps", "weight_decay")
