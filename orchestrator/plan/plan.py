"""What a run would do: an action per stage, its reason, counts and time. A pure function of graph and keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.stages import Stage
from orchestrator.spec.cell import Resources
from orchestrator.spec.work import TrainWork

ACTIONS = ("run", "resume", "done", "blocked")
PHASES = ("prepare", "pretrain", "finetune", "evaluate")


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one stage and why. `step` is where a resumed training stage goes on."""

    name: str  # run | resume | done | blocked
    reason: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of all stages of a graph and their cost."""

    graph: StageGraph
    actions: Mapping[str, Action]
    clock: Clock = field(default_factory=Clock)

    def keys(self, *names: str) -> list[str]:
        """Return the keys of the stages with one of these actions, in topological order."""
        return [key for key in self.graph.stages if self.actions[key].name in names]

    @property
    def pending(self) -> list[str]:
        """Stages that a run would work on."""
        return self.keys("run", "resume")

    @property
    def settled(self) -> bool:
        """Nothing to do: everything is done or blocked."""
        return not self.pending

    def guarded(self, key: str) -> bool:
        """Return whether a training stage still waits for preparation: no cell that needs it has all of its own.

        What has been used up and collected is not made again for this.
        """
        guards = self.graph.guards(key)
        waiting = ("run", "blocked")
        return bool(guards) and all(any(self.actions[guard].name in waiting for guard in own) for own in guards)

    def counts(self) -> dict[str, int]:
        """Return action -> number of stages, all four actions present."""
        counter = Counter(action.name for action in self.actions.values())
        return {name: counter.get(name, 0) for name in ACTIONS}

    def seconds(self, key: str) -> float:
        """Return the expected seconds of the work left in a stage."""
        stage = self.graph.stages[key]
        whole = self.clock.seconds(stage, self.graph.resources(key), self.vocabulary(stage))
        if isinstance(stage.work, TrainWork) and stage.steps:
            left = (stage.work.stop - max(self.actions[key].step, stage.work.start)) / stage.steps
            return whole * left
        return whole

    def vocabulary(self, stage: Stage) -> int:
        """Return the size of the vocabulary of the cells that use a stage."""
        return self.graph.cell(self.graph.users[stage.key][0]).cell.tokenizer.vocab_size

    def hours(self, *, gpu: bool) -> float:
        """Return GPU-hours (or core-hours) of everything that is still to be done."""
        total = 0.0
        for key in self.pending:
            total += self.seconds(key) / 3600 * devices(self.graph.resources(key), gpu=gpu)
        return total

    def hours_of_grid(self, *, gpu: bool, shared: bool) -> float:
        """Return GPU-hours (or core-hours) of the whole grid from nothing, with or without sharing."""
        total = 0.0
        for key, stage in self.graph.stages.items():
            resources = self.graph.resources(key)
            seconds = self.clock.seconds(stage, resources, self.vocabulary(stage))
            times = 1 if shared else len(self.graph.users[key])
            total += times * seconds / 3600 * devices(resources, gpu=gpu)
        return total


def devices(resources: Resources, *, gpu: bool) -> int:
    """Return the GPUs (or cores) that a job of these resources holds."""
    per_process = resources.gpus if gpu else resources.cores
    return resources.nodes * resources.processes * per_process


def make_plan(
    graph: StageGraph,
    keys: Collection[str],
    *,
    failed: Mapping[str, str] | None = None,
    stale: Collection[str] = (),
    attempted: Collection[str] = (),
    damaged: Collection[str] = (),
    clock: Clock | None = None,
) -> Plan:
    """Decide what happens to each stage.

    `keys`: artifacts in the store. `failed`: stages that must not be tried again, with the reason; what needs them is
    blocked. `stale`: artifacts whose parents were replaced. `attempted`: stages that some job has begun, the only
    ones searched for periodic checkpoints to go on from. `damaged`: absent ones that are made again, needed or not.
    """
    present = keys if isinstance(keys, (set, frozenset)) else set(keys)
    failed = failed or {}
    stale_keys, begun = set(stale), set(attempted)
    needed = _needed(graph, present, stale_keys, damaged)
    actions: dict[str, Action] = {}
    # Preparation first: training waits for that of its cells, which may stand behind it.
    for key, stage in sorted(graph.stages.items(), key=lambda item: item[1].phase != "prepare"):
        if key in needed:
            actions[key] = _action(graph, stage, present, failed, stale_keys, begun, actions)
        else:
            actions[key] = Action("done", "" if key in present else "not needed: all that uses it is done")
    return Plan(graph, actions, clock or Clock())


def _needed(graph: StageGraph, present: Collection[str], stale: Collection[str], damaged: Collection[str]) -> set[str]:
    """Return the cells' wanted artifacts, damaged ones, and whatever missing ones must be made from, transitively."""
    needed: set[str] = set()
    waiting = [key for cell in graph.cells.values() for key in (cell.final, *(r.key for r in cell.results))]
    waiting += [key for key in damaged if key in graph.stages]
    while waiting:
        key = waiting.pop()
        if key in needed:
            continue
        needed.add(key)
        if key not in present or key in stale:
            waiting.extend(parent for parent in graph.stages[key].parents if parent in graph.stages)
    return needed


def _blocked(key: str, actions: Mapping[str, Action]) -> bool:
    return key in actions and actions[key].name == "blocked"


def _action(
    graph: StageGraph,
    stage: Stage,
    present: Collection[str],
    failed: Mapping[str, str],
    stale: Collection[str],
    begun: Collection[str],
    actions: Mapping[str, Action],
) -> Action:
    if stage.key in present and stage.key not in stale:
        return Action("done")
    if stage.key in failed:
        return Action("blocked", failed[stage.key])
    blocking = [parent for parent in stage.parents if _blocked(parent, actions)]
    guards = [[guard for guard in guards if _blocked(guard, actions)] for guards in graph.guards(stage.key)]
    if guards and all(guards):
        blocking += guards[0]
    if blocking:
        reason = actions[blocking[0]].reason
        by = reason if reason.startswith("blocked by ") else f"blocked by {graph.stages[blocking[0]].label}: {reason}"
        return Action("blocked", by)
    if stage.key in begun and isinstance(stage.work, TrainWork):
        step = latest_step(stage.work, present)
        if step > stage.work.start:
            return Action("resume", f"from step {step} of {stage.work.stop}", step)
    if stage.key in stale:
        return Action("run", "a parent was repaired")
    return Action("run", "new")


def latest_step(work: TrainWork, present: Collection[str]) -> int:
    """Return the last step in (start, stop] whose state is in the store, else start."""
    steps = list(range(work.start + 1, work.stop + 1))
    keys = work.keys_at(steps)
    return max((step for step, key in zip(steps, keys, strict=True) if key in present), default=work.start)
