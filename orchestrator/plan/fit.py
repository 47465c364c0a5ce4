"""Whether a grid's shapes fit their devices and hosts, by how much they do not, and what would make them fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.catalog.engines import ENGINES, sharing_all
from orchestrator.catalog.gpus import GPUS, Gpu
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.plan.answers import Answer
from orchestrator.plan.roofline import PROCESS_BYTES, RESERVED
from orchestrator.plan.shapes import TRAINING, Shape
from orchestrator.spec.cell import Resources

# GPUs of a node that are proposed, and nodes.
GPUS_A_NODE, NODES = (1, 2, 4, 8), (1, 2, 4, 8)
GB = 1_000_000_000
# Recomputation, the least first.
LEVELS = ("none", "block", "layer")


@dataclass(frozen=True, slots=True)
class Fit:
    """How much of a device and of a host a shape takes, and how much there is."""

    device: int
    device_limit: int
    host: int
    host_limit: int
    moment: str = ""  # at which the device holds most
    failed: str = ""

    @property
    def short(self) -> int:
        """Bytes of the device that are missing."""
        return max(0, self.device - self.device_limit)

    @property
    def host_short(self) -> int:
        """Bytes of the host that are missing."""
        return max(0, self.host - self.host_limit)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not (self.failed or self.short or self.host_short)


def fit_of(shape: Shape, answer: Answer, gpu: Gpu) -> Fit:
    """Return how a shape fits; on a CPU its tensors lie in host memory."""
    resources = shape.resources
    limit = int(resources.memory_gb * GB)
    host = resources.processes * (answer.host + PROCESS_BYTES[shape.device])
    moment = max(answer.moments, key=lambda name: answer.moments[name].bytes, default="")
    if shape.device == "cpu":
        return Fit(0, 0, host + resources.processes * answer.peak, limit, moment, answer.failed)
    return Fit(answer.peak, int(gpu.memory * (1 - RESERVED)), host, limit, moment, answer.failed)


def remedy(shape: Shape, fit: Fit, gpu: Gpu, ask: Callable[[Shape], Answer]) -> tuple[str, ...]:
    """Return the smallest change of execution fields that makes a shape fit, as KEY=VALUE words, () if none is known.

    Changes are tried in the order of the GPUs that they take; `ask` simulates one.
    """
    phase = shape.label.rpartition(" ")[2]
    if not fit.short:
        gigabytes = math.ceil(fit.host / GB)
        return (f"set.execution.resources.{phase}.memory_gb={gigabytes}",) if fit.host_short else ()
    for engine, resources, recompute in _changes(shape):
        changed = shape.changed(resources, engine=engine, recompute=recompute)
        answer = ask(changed)
        found = fit_of(changed, answer, gpu)
        if answer.failed or found.short:
            continue
        words = [] if engine == shape.engine else [f"set.execution.engine={engine}"]
        if recompute != shape.question["recompute"]:
            words.append(f"set.execution.recompute={recompute}")
        for name in ("nodes", "processes", "gpus"):
            if getattr(resources, name) != getattr(shape.resources, name):
                words.append(f"set.execution.resources.{phase}.{name}={getattr(resources, name)}")
        if found.host_short:
            words.append(f"set.execution.resources.{phase}.memory_gb={math.ceil(found.host / GB)}")
        return tuple(words)
    return ()


def larger(fit: Fit) -> str:
    """Return the smallest GPU that would hold a shape, "" if none does."""
    roomy = [gpu for gpu in GPUS.values() if gpu.memory * (1 - RESERVED) >= fit.device]
    return min(roomy, key=lambda gpu: gpu.memory).name if roomy else ""


def _changes(shape: Shape) -> Iterator[tuple[str, Resources, str]]:
    """Yield (engine, resources, recomputation) under which a phase could run as well, those of fewer GPUs first."""
    if shape.kind != TRAINING or shape.train is None:
        return
    optimizer = OPTIMIZERS.get(shape.train.optimizer)
    engines = [name for name in (shape.engine, *sharing_all()) if ENGINES.get(name).updates(optimizer)]
    sizes = sorted((nodes * gpus, nodes, gpus) for nodes in NODES for gpus in GPUS_A_NODE if nodes == 1 or gpus == 8)
    for ranks, nodes, gpus in sizes:
        if ranks < shape.ranks or not shape.fills(ranks):
            continue
        resources = dataclasses.replace(shape.resources, nodes=nodes, processes=gpus, gpus=gpus)
        for engine in dict.fromkeys(engines):
            known = shape.question["recompute"] if (engine, ranks) == (shape.engine, shape.ranks) else None
            if ranks >= ENGINES.get(engine).least_processes:
                levels = LEVELS if ENGINES.get(engine).recomputes else LEVELS[:1]
                yield from ((engine, resources, level) for level in levels if level != known)
