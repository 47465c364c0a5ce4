"""The simulation of one shape: its answer, how it fits, what would make it fit, and its hours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from orchestrator.catalog.gpus import Gpu
from orchestrator.plan.answers import Answer
from orchestrator.plan.cost import evaluated_tokens
from orchestrator.plan.fit import Fit, fit_of, larger, remedy
from orchestrator.plan.plan import Plan
from orchestrator.plan.roofline import Reckoned, assumptions, reckoned
from orchestrator.plan.shapes import EVALUATION, TRAINING, Shape


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is known of a shape. `change` are the words that make it fit, `gpu_hours` those of all its stages."""

    shape: Shape
    answer: Answer
    fit: Fit
    time: Reckoned
    change: tuple[str, ...]
    larger: str
    gpu_hours: float

    @staticmethod
    def to_json(found: Sequence[Simulation], gpu: Gpu) -> dict[str, object]:
        """Return what `moegrid simulate --json` writes of the shapes."""
        return {
            "gpu": asdict(gpu),
            "fits": all(one.fit.fits for one in found),
            "gpu_hours": round(sum(one.gpu_hours for one in found), 3),
            "shapes": [one._row() for one in found],
            "assumed": assumptions(gpu),
        }

    def _row(self) -> dict[str, object]:
        shape, answer, fit = self.shape, self.answer, self.fit
        resources = shape.resources
        return {
            "label": shape.label,
            "kind": shape.kind,
            "stages": sum(shape.stages.values()),
            "engine": shape.engine,
            "nodes": resources.nodes,
            "processes": resources.processes,
            "parameters": answer.parameters,
            "moments": {name: {"bytes": held.bytes, "kinds": held.kinds} for name, held in answer.moments.items()},
            "device": {"bytes": fit.device, "limit": fit.device_limit, "short": fit.short, "moment": fit.moment},
            "host": {"bytes": fit.host, "limit": fit.host_limit, "short": fit.host_short},
            "collectives": [{"name": n, "bytes": size, "times": times} for n, size, times in answer.collectives],
            "sent": round(self.time.sent),
            "flops": answer.flops,
            "looks": answer.looks,
            "seconds": {"compute": self.time.compute, "communication": self.time.communication},
            "gpu_hours": round(self.gpu_hours, 3),
            "fits": fit.fits,
            "failed": answer.failed,
            "change": list(self.change),
            "larger": self.larger,
        }


def simulation_of(plan: Plan, shape: Shape, gpu: Gpu, ask: Callable[[Shape], Answer]) -> Simulation:
    """Simulate one shape, and where it does not fit the changes that might make it fit."""
    answer = ask(shape)
    fit = fit_of(shape, answer, gpu)
    change = () if fit.fits or answer.failed else remedy(shape, fit, gpu, ask)
    time = reckoned(answer, gpu, shape.ranks, shape.resources.nodes)
    hours = sum(count * _seconds(plan, shape, stage.key, answer, time) for stage, count in shape.stages.items()) / 3600
    held = shape.resources.nodes * max(shape.resources.gpus, 1) if shape.device == "cuda" else 0
    return Simulation(shape, answer, fit, time, change, larger(fit) if fit.short else "", hours * held)


def _seconds(plan: Plan, shape: Shape, key: str, answer: Answer, time: Reckoned) -> float:
    """Return the seconds of one stage: steps, or tokens at the rate of the simulated pass."""
    stage = plan.graph.stages[key]
    if shape.kind == TRAINING:
        return stage.steps * time.seconds
    if shape.kind == EVALUATION and answer.tokens:
        return evaluated_tokens(stage) / answer.tokens * time.seconds / shape.ranks
    return 0.0
