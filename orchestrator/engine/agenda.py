"""What to submit first: ready stages in order of urgency, of which no more are looked at than the site may take."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence

from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.plan import make_plan
from orchestrator.spec.cell import Resources

# Stages of each kind of resources that are looked at first; four times as many each time all of them fit.
FIRST = 64

# What the grid wants first, evaluations before training, then what most of the remaining time hangs on.
Urgency = tuple[int, int, float, int]


class Agenda:
    """The ready stages of a graph that no job has, sorted, by the resources that they ask for."""

    def __init__(self, graph: StageGraph, clock: Clock) -> None:
        self._graph = graph
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._index: dict[str, int] = {}
        self._listed: frozenset[str] = frozenset()
        self._sorted: dict[Resources, list[tuple[Urgency, str]]] = {}
        self._together: dict[str, set[str]] = {}  # cell -> evaluations listed that share a job

    def choose(
        self,
        ready: Collection[str],
        done: Collection[str],
        taken: Collection[str],
        resources: Callable[[Sequence[str]], Resources],
        admit: Callable[[Sequence[Resources]], Sequence[bool]],
        room: int,
    ) -> list[tuple[list[str], Resources]]:
        """Return the most urgent chains of `ready` that fit, at most `room`, each with its resources.

        `done` and `taken` are as in `StageGraph.chains`; `resources` tells what a chain asks for, `admit` what of that
        may be submitted now.
        """
        if not ready or room <= 0:
            return []
        self._list(frozenset(ready))
        count = FIRST
        while True:
            chains = sorted(self._graph.chains(self._first(count), done, taken), key=lambda c: self._urgency(c[0]))
            wanted = [resources(chain) for chain in chains]
            answers = admit(wanted)
            chosen = [(c, w) for c, w, fits in zip(chains, wanted, answers, strict=True) if fits][:room]
            refused = {self._graph.resources(c[0]) for c, fits in zip(chains, answers, strict=True) if not fits}
            # Of what was refused once, more of the same would be refused as well.
            unseen = [
                listed[count][0] for kind, listed in self._sorted.items() if len(listed) > count and kind not in refused
            ]
            if not unseen or (len(chosen) == room and self._urgency(chosen[-1][0][0]) < min(unseen)):
                return chosen
            count *= 4

    def _list(self, ready: frozenset[str]) -> None:
        if not self._seconds:
            self._seconds = critical_path(self._graph, self._clock)
            self._index = {key: index for index, key in enumerate(self._graph.stages)}
        gone, new = self._listed - ready, ready - self._listed
        self._listed = ready
        if len(gone) + len(new) > len(ready) // 8:
            self._sorted, self._together, gone, new = {}, {}, frozenset(), frozenset()
            for key in ready:
                self._sorted.setdefault(self._graph.resources(key), []).append((self._urgency(key), key))
                self._evaluations(key).add(key)
            for listed in self._sorted.values():
                listed.sort()
        for key in gone:
            listed = self._sorted[self._graph.resources(key)]
            del listed[bisect_left(listed, (self._urgency(key), key))]
            self._evaluations(key).discard(key)
        for key in new:
            insort(self._sorted.setdefault(self._graph.resources(key), []), (self._urgency(key), key))
            self._evaluations(key).add(key)

    def _evaluations(self, key: str) -> set[str]:
        """Return the set of those listed that share a job with an evaluation; of another stage one of no use."""
        if self._graph.stages[key].phase != "evaluate":
            return set()
        return self._together.setdefault(self._graph.users[key][0], set())

    def _first(self, count: int) -> list[str]:
        """Return the `count` most urgent stages of each kind of resources, and what shares a job with them."""
        first = {key for listed in self._sorted.values() for _, key in listed[:count]}
        for key in list(first):
            first |= self._evaluations(key)
        return sorted(first, key=self._index.__getitem__)

    def _urgency(self, key: str) -> Urgency:
        evaluates = self._graph.stages[key].phase == "evaluate"
        return self._graph.rank(key), 0 if evaluates else 1, -self._seconds[key], self._index[key]


def critical_path(graph: StageGraph, clock: Clock) -> dict[str, float]:
    """Return for each stage the expected seconds of the longest chain of work that starts with it."""
    plan = make_plan(graph, (), clock=clock)
    seconds: dict[str, float] = {}
    for key in reversed(list(graph.stages)):
        seconds[key] = plan.seconds(key) + max([seconds.get(child, 0.0) for child in graph.children(key)], default=0.0)
    return seconds
