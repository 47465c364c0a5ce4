"""What a run would do: an action per stage, its reason, counts and time. A pure function of graph and keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.plan.cost import Clock, flops, parameters, state_bytes, tokens_of
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.needs import gates, missing_benchmarks
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
        whole = self.clock.seconds(stage, self.graph.resources(key), self._vocab(stage))
        if isinstance(stage.work, TrainWork) and stage.steps:
            left = (stage.work.stop - max(self.actions[key].step, stage.work.start)) / stage.steps
            return whole * left
        return whole

    def _vocab(self, stage: Stage) -> int:
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
            seconds = self.clock.seconds(stage, resources, self._vocab(stage))
            times = 1 if shared else len(self.graph.users[key])
            total += times * seconds / 3600 * devices(resources, gpu=gpu)
        return total

    def phases(self) -> list[dict[str, Any]]:
        """Return one row per phase: stages and steps with and without sharing, and the actions."""
        shared, unshared = self.graph.sharing(), self.graph.unshared()
        rows = []
        for phase in PHASES:
            if phase not in shared:
                continue
            stages = [stage for stage in self.graph.stages.values() if stage.phase == phase]
            actions = Counter(self.actions[stage.key].name for stage in stages)
            rows.append(
                {
                    "phase": phase,
                    "stages": {"shared": shared[phase][0], "unshared": unshared[phase][0]},
                    "steps": {"shared": shared[phase][1], "unshared": unshared[phase][1]},
                    "flops": sum(flops(stage, self._vocab(stage)) for stage in stages),
                    "state_bytes": sum(state_bytes(stage, self._vocab(stage)) for stage in stages),
                    "actions": {name: actions.get(name, 0) for name in ACTIONS},
                }
            )
        return rows

    def groups(self) -> list[dict[str, Any]]:
        """Return one row per block of the grid (cells that set the same factors) with its training segments.

        Segments are counted for the last training phase, where the cells of a block differ, with and without sharing.
        """
        blocks: dict[tuple[str, ...], list[str]] = {}
        for item in self.graph.grid.cells:
            blocks.setdefault(tuple(item.factors), []).append(item.id)
        rows = []
        for factors, ids in blocks.items():
            segments = []
            for cell_id in ids:
                stages = self.graph.cells[cell_id].stages
                last = next((s.phase for s in reversed(stages) if s.kind == "train"), "")
                segments.append([s.key for s in stages if s.kind == "train" and s.phase == last])
            keys = {key for cell in segments for key in cell}
            seeds = len({self._seeds(cell_id) for cell_id in ids})
            sample = self.graph.cell(ids[0]).cell
            count = parameters(sample.model, sample.tokenizer.vocab_size)
            rows.append(
                {
                    "factors": list(factors),
                    "cells": len(ids),
                    "seeds": seeds,
                    "segments": {"shared": len(keys), "unshared": sum(map(len, segments))},
                    "actions": dict(Counter(self.actions[key].name for key in keys)),
                    "reason": self._reason(keys),
                    "parameters": {"total": count.total, "active": count.active},
                    "flops_per_token": count.flops_per_token,
                }
            )
        return rows

    def _seeds(self, cell_id: str) -> tuple[Any, ...]:
        seed = self.graph.cell(cell_id).cell.seed
        return (seed.data, seed.init, seed.pretrain, seed.finetune, seed.eval)

    def _reason(self, keys: Collection[str]) -> str:
        reasons = Counter(self.actions[key].reason for key in keys if self.actions[key].reason)
        return "; ".join(reason for reason, _ in reasons.most_common(3))

    def models(self) -> list[dict[str, Any]]:
        """Return one row per shape: total and active parameters, forward FLOPs a token, training tokens, cells."""
        rows: dict[Any, dict[str, Any]] = {}
        for item in self.graph.grid.cells:
            model = item.cell.model
            count = parameters(model, item.cell.tokenizer.vocab_size)
            phases = {"pretrain": item.cell.pretrain, "finetune": item.cell.finetune}
            row = {
                "backbone": model.backbone,
                "preset": model.moe.preset,
                "experts": f"{model.moe.top_k}/{model.moe.num_experts}+{model.moe.shared_experts or 0}",
                "total": count.total,
                "active": count.active,
                "flops_per_token": count.flops_per_token,
                "tokens": {phase: tokens_of(train) for phase, train in phases.items() if train is not None},
            }
            rows.setdefault(repr(row), {**row, "cells": 0})["cells"] += 1
        return list(rows.values())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON types (the contract of `moegrid plan --json`)."""
        grid = self.graph.grid
        shared, unshared = self.graph.sharing(), self.graph.unshared()
        return {
            "grid": grid.name,
            "scale": grid.scale,
            "cells": len(grid.cells),
            "stages": {"shared": _sum(shared, 0), "unshared": _sum(unshared, 0)},
            "train_steps": {"shared": _sum(shared, 1), "unshared": _sum(unshared, 1)},
            "actions": self.counts(),
            "gpu_hours": round(self.hours(gpu=True), 3),
            "core_hours": round(self.hours(gpu=False), 3),
            "gpu_hours_of_grid": {
                "shared": round(self.hours_of_grid(gpu=True, shared=True), 3),
                "unshared": round(self.hours_of_grid(gpu=True, shared=False), 3),
            },
            "phases": self.phases(),
            "groups": self.groups(),
            "models": self.models(),
            "plugins": [{**use.to_json(), "shown": str(use)} for use in self.graph.uses()],
            "gated": [{"name": gate.name, "stages": gate.stages, "hint": gate.hint} for gate in gates(self)],
            "left_out": [
                {"suite": left.suite, "tasks": list(left.tasks), "hint": left.hint} for left in missing_benchmarks(grid)
            ],
            "blocked": [
                {"stage": key, "label": self.graph.stages[key].label, "reason": self.actions[key].reason}
                for key in self.keys("blocked")
            ],
        }


def devices(resources: Resources, *, gpu: bool) -> int:
    """Return the GPUs (or cores) that a job of these resources holds."""
    per_process = resources.gpus if gpu else resources.cores
    return resources.nodes * resources.processes * per_process


def _sum(totals: Mapping[str, tuple[int, int]], index: int) -> int:
    return sum(pair[index] for pair in totals.values())


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
