"""A plan that follows the store: it is told what changed, and decides again about that and what depends on it alone.

It comes to the plan that `make_plan` makes of the same artifacts and failures (tested step by step), which a grid of a
hundred thousand cells cannot afford to make anew whenever one stage is done.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping

from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.plan import ACTIONS, DONE, NEW, NOT_NEEDED, Action, Plan, decided

PENDING = ("run", "resume")


class Following:
    """The plan of a graph under a changing set of artifacts and failures; `ready` are the stages that could start now.

    `open` are all that are needed and absent. `ready` counts neither jobs at work nor times to wait: their artifacts'
    parents are all there, and what their cells need prepared is.
    """

    def __init__(self, graph: StageGraph, clock: Clock | None = None) -> None:
        self._graph = graph
        self._clock = clock or Clock()
        prepared = [key for key, stage in graph.stages.items() if stage.phase == "prepare"]
        # Preparation first: training waits for that of its cells, which may stand behind it.
        others = [key for key, stage in graph.stages.items() if stage.phase != "prepare"]
        self.order = {key: index for index, key in enumerate((*prepared, *others))}
        self._wanted = {key for cell in graph.cells.values() for key in (cell.final, *(r.key for r in cell.results))}
        self._demand: dict[str, int] = {}  # key -> how many stages that are needed and absent are made from it
        self.open: set[str] = set()  # needed and absent
        self._lacking = {key: len(stage.parents) for key, stage in graph.stages.items() if stage.parents}
        self._groups = _groups(graph)
        self._guarded: dict[int, bool] = {}
        self._of_guard: dict[str, set[int]] = {}
        for number, (guards, _) in self._groups.items():
            for guard in (guard for own in guards for guard in own):
                self._of_guard.setdefault(guard, set()).add(number)
        self._present: set[str] = set()
        self._failed: dict[str, str] = {}
        self._damaged: frozenset[str] = frozenset()
        self.actions: dict[str, Action] = {}
        self.counts = dict.fromkeys(ACTIONS, 0)
        self.ready: set[str] = set()
        self._begun = False

    def update(self, present: set[str], failed: Mapping[str, str], damaged: Collection[str] = ()) -> Plan:
        """Return the plan with these artifacts, failures (stage -> reason) and damaged stages of the graph."""
        changed = present ^ self._present
        changed.update(key for key in failed.keys() | self._failed.keys() if failed.get(key) != self._failed.get(key))
        changed |= self._damaged.symmetric_difference(damaged)
        if not self._begun:
            changed = set(self._graph.stages)
            self._begun = True
        arrived = present ^ self._present
        lost = self._present - present
        self._present, self._failed, self._damaged = set(present), dict(failed), frozenset(damaged)
        for key in arrived:
            for child in self._graph.children(key):
                if child in self._lacking:
                    self._lacking[child] += 1 if key in lost else -1
        touched = self._settle_need(changed)
        looked_at = self._decide(touched)
        looked_at.update(child for key in arrived for child in self._graph.children(key))
        for key in looked_at:
            if self._can_start(key):
                self.ready.add(key)
            else:
                self.ready.discard(key)
        return Plan(self._graph, self.actions, self._clock, dict(self.counts))

    def _settle_need(self, changed: Iterable[str]) -> set[str]:
        """Bring up to date what is needed; return every stage whose action may be another one."""
        stages = self._graph.stages
        touched = {key for key in changed if key in stages}
        waiting = list(touched)
        while waiting:
            key = waiting.pop()
            touched.add(key)
            is_open = key not in self._present and self._needed(key)
            if is_open == (key in self.open):
                continue
            if is_open:
                self.open.add(key)
            else:
                self.open.discard(key)
            for parent in stages[key].parents:
                if parent in stages:
                    self._demand[parent] = self._demand.get(parent, 0) + (1 if is_open else -1)
                    waiting.append(parent)
        return touched

    def _needed(self, key: str) -> bool:
        return self._demand.get(key, 0) > 0 or key in self._wanted or key in self._damaged

    def _decide(self, touched: Iterable[str]) -> set[str]:
        """Decide again about these stages and all that is blocked, or no longer blocked, by them; return them all."""
        order, actions = self.order, self.actions
        queue = [(order[key], key) for key in touched]
        heapq.heapify(queue)
        queued = {key for _, key in queue}
        looked_at = set(queued)
        while queue:
            _, key = heapq.heappop(queue)
            queued.discard(key)
            before, after = actions.get(key), self._action(key)
            if before == after:
                continue
            actions[key] = after
            self.counts[after.name] += 1
            if before is not None:
                self.counts[before.name] -= 1
            follow: list[str] = []
            if "blocked" in (after.name, before.name if before else ""):
                follow.extend(self._graph.children(key))
            for number in self._of_guard.get(key, ()):
                guards, keys = self._groups[number]
                blocking = "blocked" in (after.name, before.name if before else "")
                if blocking or self._guarded.get(number) != self._is_guarded(guards):
                    follow.extend(keys)
                self._guarded[number] = self._is_guarded(guards)
            for other in follow:
                looked_at.add(other)
                if other not in queued:
                    queued.add(other)
                    heapq.heappush(queue, (order[other], other))
        return looked_at

    def _action(self, key: str) -> Action:
        present = key in self._present
        if not self._needed(key):
            return DONE if present else NOT_NEEDED
        if present:
            return DONE
        if not self._failed:
            return NEW
        return decided(self._graph, self._graph.stages[key], self._failed, self.actions)

    def _is_guarded(self, guards: tuple[tuple[str, ...], ...]) -> bool:
        waiting = ("run", "blocked")
        return all(any(g in self.actions and self.actions[g].name in waiting for g in own) for own in guards)

    def _can_start(self, key: str) -> bool:
        if self.actions[key].name not in PENDING or self._lacking.get(key, 0):
            return False
        guards = self._graph.guards(key)
        return not guards or not self._is_guarded(guards)


def _groups(graph: StageGraph) -> dict[int, tuple[tuple[tuple[str, ...], ...], list[str]]]:
    """Return the training stages by what must be prepared before them: a graph has one object for equal guards."""
    groups: dict[int, tuple[tuple[tuple[str, ...], ...], list[str]]] = {}
    for key in graph.stages:
        if guards := graph.guards(key):
            groups.setdefault(id(guards), (guards, []))[1].append(key)
    return groups
