"""What a plan knows of its stages' memory without torch: simulations that are kept, else bytes in closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.gpus import GPUS, Gpu
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.errors import MoegridError
from orchestrator.plan.answers import known_answer
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.roofline import RESERVED
from orchestrator.plan.shapes import EVALUATION, TRAINING, Shape, shapes_of


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that each GPU of a shape holds: its simulated peak, or what it holds at least."""

    label: str
    bytes: int
    simulated: bool

    def fits(self, gpu: Gpu) -> bool:
        """Whether a GPU has as many, or may have."""
        return self.bytes <= gpu.memory * (1 - RESERVED)

    def to_json(self) -> dict[str, object]:
        """Return JSON types."""
        return {"label": self.label, "bytes": self.bytes, "simulated": self.simulated}


def memory_of(graph: StageGraph, keys: Collection[str] | None = None) -> list[Memory]:
    """Return the memory of every shape that runs on GPUs, of the stages `keys` alone where they are given."""
    if all(item.cell.execution.device != "cuda" for item in graph.grid.cells):
        return []
    found = []
    for shape in shapes_of(graph):
        if shape.device != "cuda" or (keys is not None and not any(stage.key in keys for stage in shape.stages)):
            continue
        answer = known_answer(shape.question)
        count = parameters(shape.model, shape.vocabulary).total
        peak = least_bytes(shape, count) if answer is None else answer.peak
        found.append(Memory(shape.label, peak, answer is not None))
    return found


def refused_memory(memory: Collection[Memory], gpu: Gpu | None) -> MoegridError | None:
    """Return what is wrong when a shape cannot fit: on the named GPU, or on any that is known."""
    most = gpu or max(GPUS.values(), key=lambda one: one.memory)
    lacking = [one for one in memory if not one.fits(most)]
    if not lacking:
        return None
    worst = max(lacking, key=lambda one: one.bytes)
    how = "simulated" if worst.simulated else "at least, without activations"
    return MoegridError(
        f"{worst.label} does not fit: {worst.bytes / 1e9:.1f} GB a GPU ({how}), and {most.name} has "
        f"{most.memory * (1 - RESERVED) / 1e9:.1f}",
        cause=f"{len(lacking)} of {len(memory)} shapes of this grid are too large for one GPU each",
        hint="moegrid simulate says what would make it fit; --force-memory runs it all the same",
    )


def least_bytes(shape: Shape, parameters: int) -> int:
    """Return the bytes of weights, gradients and optimizer state that a rank holds at least: no activations.

    In closed form, for what was not simulated yet, from what the engine declares.
    """
    if shape.kind == EVALUATION:
        return parameters * (2 if shape.question["precision"] == "bf16" else 4)
    if shape.kind != TRAINING or shape.train is None:
        return 0
    train, ranks, engine = shape.train, shape.ranks, ENGINES.get(shape.engine)
    half = train.precision == "bf16"
    weights = (2 if half and engine.masters else 4) * parameters // engine.part("weights", ranks)
    if train.adapter.rank:  # only adapters have gradients and moments
        return weights
    gradients = (2 if half and engine.half_gradients else 4) * parameters // engine.part("gradients", ranks)
    moments = 4 * (2 if "exp_avg_sq" in OPTIMIZERS.get(train.optimizer).slots else 1)
    masters = 4 if half and engine.masters else 0
    return weights + gradients + (masters + moments) * parameters // engine.part("optimizer", ranks)
