"""Which training states are kept with their optimizer's state: those from which training goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.catalog.freezing import freezes
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.stage import Stage
from orchestrator.spec.training import TrainSpec
from orchestrator.spec.work import TrainWork

SINGLE = 4  # bytes of a number in full precision
# An optimizer's state that is larger is not kept for what the same job goes on to: steps cost less than the bytes.
HEAVY = 16e9


def frozen_roles(train: TrainSpec, sizes: Mapping[str, int]) -> frozenset[str]:
    """Return the roles that do not train at all under these conditions."""
    if train.adapter.rank:
        return frozenset(role for role in sizes if role != "router" or train.adapter.router == "frozen")
    return frozenset(role for role in sizes if freezes(train.freeze, role))


def moments_bytes(train: TrainSpec, sizes: Mapping[str, int], trained: Collection[str]) -> int:
    """Return the bytes of what the optimizer keeps of the roles that were updated in a phase."""
    kind = OPTIMIZERS.get(train.optimizer)
    return SINGLE * sum(kind.held(role) * sizes[role] for role in trained)


def continues(stage: Stage) -> bool:
    """Return whether a stage goes on from a state of its own phase; a later phase has an optimizer of its own."""
    return isinstance(stage.made, TrainWork) and stage.made.start > 0


def continuations(graph: StageGraph, key: str) -> list[str]:
    """Return the stages that go on from the state `key` within its phase."""
    stages = ((child, graph.stages[child]) for child in graph.children(key))
    return [child for child, stage in stages if continues(stage) and stage.parents[0] == key]


def keeps_moments(graph: StageGraph, key: str, job: Collection[str] = ()) -> bool:
    """Return whether the state `key` is kept whole; `job` are the stages of its job, () as it will probably be.

    What goes on in the same process needs no file, if the phase has states on the way to which it could go back.
    """
    going_on = continuations(graph, key)
    if len(going_on) != 1 or (job and going_on[0] not in job):
        return bool(going_on)
    stage, execution = graph.stages[key], graph.execution(key)
    assert isinstance(stage.made, TrainWork)
    train, sizes = stage.made.conditions.train, parameters(stage.made.model, graph.vocabulary(key)).roles
    on_the_way = execution.checkpoint_steps > 0 or execution.checkpoint_seconds > 0
    return not on_the_way or moments_bytes(train, sizes, sizes.keys() - frozen_roles(train, sizes)) < HEAVY
