"""What a run would do: an action per stage, its reason, counts and time. A pure function of graph and keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.stage import Stage
from orchestrator.spec.cell import Resources
from orchestrator.spec.rules import PHASES
from orchestrator.spec.work import TrainWork

ACTIONS = ("run", "resume", "done", "blocked")
STAGE_PHASES = ("prepare", *PHASES, "evaluate")


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one stage and why. `step` is where a resumed training stage goes on."""

    name: str  # run | resume | done | blocked
    reason: str = ""
    step: int = 0


# One object for all stages of which no more is to be said.
DONE = Action("done")
NOT_NEEDED = Action("done", "not needed: all that uses it is done")
NEW = Action("run", "new")


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of all stages of a graph and their cost."""

    graph: StageGraph
    actions: Mapping[str, Action]
    clock: Clock = field(default_factory=Clock)
    tally: Mapping[str, int] | None = None  # the counts of `counts`, where they are known
    _counted: list[tuple[Stage, float, int, int]] = field(default_factory=list, compare=False, repr=False)

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
        return not self.left

    @property
    def left(self) -> int:
        """The number of stages that a run would work on."""
        counts = self.counts()
        return counts["run"] + counts["resume"]

    def guarded(self, key: str) -> bool:
        """Return whether a training stage still waits for preparation: no cell that needs it has all of its own.

        What has been used up and collected is not made again for this.
        """
        guards = self.graph.guards(key)
        waiting = ("run", "blocked")
        return bool(guards) and all(any(self.actions[guard].name in waiting for guard in own) for own in guards)

    def counts(self) -> dict[str, int]:
        """Return action -> number of stages, all four actions present."""
        if self.tally is not None:
            return dict(self.tally)
        counter = Counter(action.name for action in self.actions.values())
        return {name: counter.get(name, 0) for name in ACTIONS}

    def seconds(self, key: str) -> float:
        """Return the expected seconds of the work left in a stage."""
        stage = self.graph.stages[key]
        return self._whole(stage) * self._left(stage)

    def vocabulary(self, stage: Stage) -> int:
        """Return the size of the vocabulary of the cells that use a stage."""
        return self.graph.vocabulary(stage.key)

    def hours(self, *, gpu: bool) -> float:
        """Return GPU-hours (or core-hours) of everything that is still to be done."""
        return self._hours(gpu=gpu)[0]

    def hours_of_grid(self, *, gpu: bool, shared: bool) -> float:
        """Return GPU-hours (or core-hours) of the whole grid from nothing, with or without sharing."""
        return self._hours(gpu=gpu)[1 if shared else 2]

    def _hours(self, *, gpu: bool) -> tuple[float, float, float]:
        """Return the hours left, those of the whole grid, and those without sharing."""
        totals = [0.0, 0.0, 0.0]
        for stage, *counts in self._classes():
            held = devices(self.graph.resources(stage.key), gpu=gpu)
            hours = self._whole(stage) / 3600 * held if held else 0.0
            for index, count in enumerate(counts):
                totals[index] += count * hours
        return totals[0], totals[1], totals[2]

    def _classes(self) -> Iterable[tuple[Stage, float, int, int]]:
        """Return for stages of equal cost: one of them, how many are left, how many there are, shared and unshared."""
        if not self._counted:
            classes: dict[tuple[int, ...], list[Any]] = {}
            for key, stage in self.graph.stages.items():
                users, action = self.graph.users[key], self.actions[key]
                cell = self.graph.cell(users[0]).cell
                alike = (*map(id, stage.alike), id(cell.execution), id(cell.tokenizer))
                found = classes.get(alike)
                if found is None:
                    found = classes[alike] = [stage, 0.0, 0, 0]
                if action.name == "run":
                    found[1] += 1.0
                elif action.name == "resume":
                    found[1] += self._left(stage)
                found[2] += 1
                found[3] += len(users)
            self._counted.extend((stage, left, shared, unshared) for stage, left, shared, unshared in classes.values())
        return self._counted

    def _whole(self, stage: Stage) -> float:
        return self.clock.seconds(stage, self.graph.resources(stage.key), self.vocabulary(stage))

    def _left(self, stage: Stage) -> float:
        """Return the part of a stage that is left where it goes on from an earlier state, else 1."""
        if not isinstance(stage.made, TrainWork) or not stage.steps:
            return 1.0
        return (stage.made.stop - max(self.actions[stage.key].step, stage.made.start)) / stage.steps


def devices(resources: Resources, *, gpu: bool) -> int:
    """Return the GPUs (or cores) that a job of these resources holds."""
    return resources.nodes * (resources.gpus if gpu else resources.processes * resources.cores)


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
    for preparing in (True, False):
        for key, stage in graph.stages.items():
            if (stage.phase == "prepare") is not preparing:
                continue
            if key not in needed:
                actions[key] = DONE if key in present else NOT_NEEDED
            elif key in present and key not in stale_keys:
                actions[key] = DONE
            elif failed or key in begun or key in stale_keys:
                actions[key] = _action(graph, stage, present, failed, stale_keys, begun, actions)
            else:
                actions[key] = NEW
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
    found = decided(graph, stage, failed, actions)
    if found is not NEW:
        return found
    if stage.key in begun and isinstance(stage.made, TrainWork):
        step = latest_step(stage.made, present)
        if step > stage.made.start:
            return Action("resume", f"from step {step} of {stage.made.stop}", step)
    return Action("run", "a parent was repaired") if stage.key in stale else NEW


def decided(graph: StageGraph, stage: Stage, failed: Mapping[str, str], actions: Mapping[str, Action]) -> Action:
    """Return what happens to a needed stage that is absent: it is run unless it failed, or something blocks it.

    `actions` are those of its parents and of what its cells need prepared.
    """
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
    return NEW


def latest_step(work: TrainWork, present: Collection[str]) -> int:
    """Return the last step in (start, stop] whose state is in the store, else start."""
    steps = list(range(work.start + 1, work.stop + 1))
    keys = work.keys_at(steps)
    return max((step for step, key in zip(steps, keys, strict=True) if key in present), default=work.start)
