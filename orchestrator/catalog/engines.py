"""Training engines by name: who holds parameters, gradients and optimizer state, on how many processes.

The code is a function `build(model, train, rank, world_size) -> Engine` (`jobs.train.engine` has the protocol), of an
engine that reads its own weights `build(model, train, rank, world_size, weights, device)`, and of one that lays out its
ranks the mesh is the last argument. An engine is how a result is computed, not what it is: it is in no key, and states
keep their bits within one engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.catalog.optimizers import OptimizerKind
from orchestrator.registry import Registry

HELD = ("weights", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine.

    `cuts`: it updates pieces of parameters, so that an optimizer must be elementwise, or, where the pieces are runs of
    `rows`, update those. `plain_model`: it leaves nothing
    in the model, which another phase may go on with in the same process. `reads_weights`: it gets a model whose
    parameters have no memory yet, and reads of the weights (a mapping from names to tensors) what this rank holds.
    `meshes`: it also gets `execution.parallel`, and lays out its ranks so.
    `scales`: the factor of its `step` alone decides what is applied, so that gradients may come multiplied (fp16).
    `recomputes`: a part of the model may run again in the backward pass (`execution.recompute`).
    `same_world`: what it keeps of an optimizer is for one number of processes, and training goes on with that alone.
    `sees`: it trains models that see, of whose encoder a phase may run nothing.
    `tidy`: it leaves nothing behind in a process, which may simulate the next shape as well.
    `shares`: of which of HELD each process holds its share alone. In bf16 it has fp32 `masters` beside weights in bf16
    (else its weights are fp32), and gradients in fp32 unless they are `half_gradients`.
    """

    name: str
    code: str
    least_processes: int = 1
    cuts: bool = False
    rows: bool = False
    plain_model: bool = False
    reads_weights: bool = False
    meshes: bool = False
    scales: bool = False
    recomputes: bool = True
    same_world: bool = False
    sees: bool = False
    tidy: bool = False
    shares: tuple[str, ...] = ()
    masters: bool = True
    half_gradients: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.shares) - set(HELD)
        if unknown:
            raise ValueError(f"an engine shares some of {', '.join(HELD)}, not {', '.join(sorted(unknown))}")

    def updates(self, optimizer: OptimizerKind) -> bool:
        """Return whether an optimizer can update what each process has of the parameters."""
        return optimizer.elementwise or not self.cuts or (self.rows and optimizer.by_rows)

    def part(self, held: str, processes: int) -> int:
        """Return which part of HELD a process has: 1 / this."""
        return processes if held in self.shares else 1


BUILTINS: Mapping[str, EngineKind] = MappingProxyType(
    {
        # One process, or data parallel.
        "torch": EngineKind(
            "torch", "jobs.train.engines.torch:TorchEngine", plain_model=True, scales=True, sees=True, tidy=True
        ),
        # Everything sharded.
        "fsdp": EngineKind(
            "fsdp",
            "jobs.train.engines.fsdp:FsdpEngine",
            least_processes=2,
            cuts=True,
            rows=True,
            reads_weights=True,
            meshes=True,
            scales=True,
            sees=True,
            tidy=True,
            shares=HELD,
            masters=False,
        ),
        # Optimizer state partitioned; with 2 gradients, with 3 parameters as well.
        "deepspeed:1": EngineKind(
            "deepspeed:1",
            "jobs.train.engines.zero:ZeroOneEngine",
            least_processes=2,
            cuts=True,
            reads_weights=True,
            shares=("optimizer",),
            half_gradients=True,
        ),
        "deepspeed:2": EngineKind(
            "deepspeed:2",
            "jobs.train.engines.zero:ZeroEngine",
            least_processes=2,
            cuts=True,
            reads_weights=True,
            shares=("gradients", "optimizer"),
            half_gradients=True,
        ),
        "deepspeed:3": EngineKind(
            "deepspeed:3",
            "jobs.train.engines.zero3:ZeroThreeEngine",
            least_processes=2,
            cuts=True,
            reads_weights=True,
            recomputes=False,
            same_world=True,
            shares=HELD,
            half_gradients=True,
        ),
    }
)
ENGINES = Registry("engines", "engine", EngineKind, BUILTINS)
# What could not be shown to freeze, fork and resume with equal bits.
REFUSED = {
    "deepspeed": "it does not say which ZeRO stage: write deepspeed:1, deepspeed:2 or deepspeed:3",
    "deepspeed:0": "it partitions nothing: engine torch is data parallel too, with a fixed order of sums",
    "ddp": "engine torch is data parallel on several processes",
}


def sharing_all() -> tuple[str, ...]:
    """Return our engines that share whatever a process holds, and whose states go on with any number of processes."""
    return tuple(name for name, kind in BUILTINS.items() if set(kind.shares) == set(HELD) and not kind.same_world)


def of_any_world() -> tuple[str, ...]:
    """Return our engines of several processes whose states go on with any number of them."""
    return tuple(name for name, kind in BUILTINS.items() if kind.cuts and not kind.same_world)


def that_see() -> tuple[str, ...]:
    """Return our engines that train models that see."""
    return tuple(name for name, kind in BUILTINS.items() if kind.sees)
