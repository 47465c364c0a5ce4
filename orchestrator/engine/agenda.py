"""What to submit first: ready stages in order of urgency, of which no more are looked at than the site may take."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Sequence

from orchestrator.backends.local import Budget
from orchestrator.engine.backfill import Backfill, Reservation, amounts, everything
from orchestrator.plan.cost import Clock
from orchestrator.plan.graph import StageGraph
from orchestrator.spec.cell import Resources

# Stages of each kind of resources that are looked at first; four times as many each time all of them fit.
FIRST = 64
# Results come early until what is left takes the site no longer than this many times its longest chain.
HORIZON = 2.0
# Waiting evaluations of one cell are shared out to idle cores where each part takes as many seconds.
WORTH_SECONDS = 3.0

# What the grid wants first, then what most of the remaining time hangs on (its upward rank, in seconds, negative);
# until the end is near evaluations come before training.
Urgency = tuple[int, int, float, int]
Chosen = list[tuple[list[str], Resources]]
Admit = Callable[[Sequence[Resources]], Sequence[bool]]


class Agenda:
    """The ready stages of a graph that no job has, sorted, by the resources that they ask for."""

    def __init__(self, graph: StageGraph, clock: Clock, backfill: Backfill | None = None) -> None:
        """`backfill` knows of jobs that were started before the graph had all its stages."""
        self._graph = graph
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._index: dict[str, int] = {}
        self._listed: frozenset[str] = frozenset()
        self._sorted: dict[Resources, list[tuple[Urgency, str]]] = {}
        self._together: dict[str, set[str]] = {}  # cell -> evaluations listed that share a job
        self._near = False
        self._look_at = 0.0
        self._now = 0.0
        self._budget: Budget | None = None
        self.backfill = backfill or Backfill()

    def rank(self) -> None:
        """Rank the stages by what the clock says now."""
        self._seconds, self._look_at = {}, 0.0
        self._ranks()

    def look(self, budget: Budget, left: Callable[[], Collection[str]], at_work: Collection[str], now: float) -> None:
        """See whether the end is near: from then on training comes before evaluations, as the longer chain.

        Before that no core will idle whatever comes first, so results do, as they do where nobody knows the cores.
        `left` are the stages to be done or at work, on a site of that `budget`, those `at_work` hold a part of it; what
        is far away at `now` seconds is looked at again when it could be near.
        """
        self._budget, self._now = budget, now
        self.backfill.keep(at_work)
        if now < self._look_at:
            return
        seconds = self._ranks()
        keys = left()
        longest = max((seconds[key] for key in keys), default=0.0)
        work = sum(self._own(key) * amounts(self._graph.resources(key), budget)[0] for key in keys)
        # What starts instead of training holds its cores to its end: all evaluations of a cell.
        slack = work / budget.cores - HORIZON * longest - self._longest_evaluations(keys)
        near = slack <= 0
        if near is not self._near:
            self._near, self._listed, self._sorted, self._together = near, frozenset(), {}, {}
        # It shrinks by one second a second, if the estimates hold.
        self._look_at = now + max(slack / 2, 1.0)

    def _longest_evaluations(self, keys: Collection[str]) -> float:
        """Return the seconds of the longest job of evaluations among the stages."""
        jobs: dict[str, float] = {}
        for key in keys:
            if self._graph.stages[key].phase == "evaluate":
                state = self._graph.users[key][0]
                jobs[state] = jobs.get(state, 0.0) + self._own(key)
        return max(jobs.values(), default=0.0)

    def choose(
        self,
        ready: Collection[str],
        done: Collection[str],
        taken: Collection[str],
        resources: Callable[[Sequence[str]], Resources],
        admit: Admit,
        room: int,
        *,
        spread: bool = False,
    ) -> Chosen:
        """Return the most urgent chains of `ready` that fit, at most `room`, each with its resources.

        Under a budget that was looked at, what fits and would make the most urgent one that does not fit later waits.
        `done` and `taken` are as in `StageGraph.chains`; `resources` tells what a chain asks for, `admit` what of that
        may be submitted now. With `spread`, where a job starts at once, evaluations that wait together are several of
        them where cores would idle, and what needs torch is apart from what does not.
        """
        if not ready or room <= 0:
            return []
        self._list(frozenset(ready))
        count = FIRST
        while True:
            found = self._graph.chains(self._first(count), done, taken, light=spread)
            chains = sorted(found, key=lambda chain: self._urgency(chain[0]))
            wanted = [resources(chain) for chain in chains]
            answers, reserved = self._admitted(chains, wanted, admit)
            chosen = [(c, w) for c, w, fits in zip(chains, wanted, answers, strict=True) if fits][:room]
            refused = {self._graph.resources(c[0]) for c, fits in zip(chains, answers, strict=True) if not fits}
            # Of what was refused once, more of the same would be refused as well.
            unseen = [
                listed[count][0] for kind, listed in self._sorted.items() if len(listed) > count and kind not in refused
            ]
            if not unseen or (len(chosen) == room and self._urgency(chosen[-1][0][0]) < min(unseen)):
                return self._started(self._spread(chosen, admit, room, reserved) if spread else chosen)
            count *= 4

    def _admitted(
        self, chains: Sequence[Sequence[str]], wanted: Sequence[Resources], admit: Admit
    ) -> tuple[Sequence[bool], Reservation | None]:
        """Return what may be submitted, and what is reserved for the first of what does not fit."""
        answers = admit(wanted)
        first = next((number for number, fits in enumerate(answers) if not fits), None)
        if first is None or self._budget is None or not any(answers[first:]):
            return answers, None
        budget = self._budget
        starting = zip(chains[:first], wanted[:first], strict=True)
        ahead = [(self._now + self._length(chain), amounts(its, budget)) for chain, its in starting]
        asked = amounts(wanted[first], budget)
        reserved = self.backfill.reserve(asked, everything(budget), ahead, self._now)
        if reserved is None:
            return answers, None
        fits = [number for number in range(first, len(chains)) if answers[number]]
        allowed = {n for n in fits if reserved.allows(self._length(chains[n]), amounts(wanted[n], budget))}
        return [number < first or number in allowed for number in range(len(chains))], reserved

    def _started(self, chosen: Chosen) -> Chosen:
        if self._budget is not None:
            for chain, wanted in chosen:
                self.backfill.started(chain[-1], self._now, self._length(chain), amounts(wanted, self._budget))
        return chosen

    def _length(self, chain: Sequence[str]) -> float:
        return sum(map(self._own, chain))

    def _spread(self, chosen: Chosen, admit: Admit, room: int, reserved: Reservation | None) -> Chosen:
        """Halve the longest job of evaluations while the site takes one more, beside what is `reserved`."""
        while len(chosen) < room:
            halves = [(self._halves(chain), number) for number, (chain, _) in enumerate(chosen)]
            (least, parts), number = max(halves, key=lambda found: found[0][0], default=((0.0, ()), 0))
            if least < WORTH_SECONDS:
                break
            wanted = [asked for _, asked in chosen]
            if not admit([*wanted, wanted[number]])[-1]:
                break
            if reserved is not None and self._budget is not None:
                seconds = max(map(self._length, parts))
                if not reserved.allows(seconds, amounts(wanted[number], self._budget)):
                    break
            chosen[number : number + 1] = [(part, wanted[number]) for part in parts]
        return chosen

    def _halves(self, chain: Sequence[str]) -> tuple[float, tuple[list[str], ...]]:
        """Return a chain of evaluations as two, and the seconds of the shorter one; 0 where it cannot be two."""
        if self._graph.stages[chain[0]].phase != "evaluate":
            return 0.0, ()
        families: dict[str, list[str]] = {}  # what needs another stage of the chain stays with it
        first: dict[str, str] = {}
        for key in chain:
            first[key] = next((first[p] for p in self._graph.stages[key].parents if p in first), key)
            families.setdefault(first[key], []).append(key)
        parts: tuple[list[str], list[str]] = ([], [])
        seconds = [0.0, 0.0]
        for family in sorted(families.values(), key=lambda keys: -sum(map(self._own, keys))):
            shorter = seconds.index(min(seconds))
            parts[shorter].extend(family)
            seconds[shorter] += sum(map(self._own, family))
        return min(seconds), parts

    def _own(self, key: str) -> float:
        return seconds_of(self._graph, self._clock, key)

    def _ranks(self) -> dict[str, float]:
        if not self._seconds:
            self._seconds = upward_ranks(self._graph, self._clock)
            self._index = self._index or {key: index for index, key in enumerate(self._graph.stages)}
            self._sorted, self._together, self._listed = {}, {}, frozenset()
        return self._seconds

    def _list(self, ready: frozenset[str]) -> None:
        self._ranks()
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
        later = not self._near and self._graph.stages[key].phase != "evaluate"
        return self._graph.rank(key), int(later), -self._seconds[key], self._index[key]


def upward_ranks(graph: StageGraph, clock: Clock) -> dict[str, float]:
    """Return for each stage the expected seconds of the longest chain of work that starts with it.

    Training waits for all that its cells need prepared, not only for what it reads. The upward rank of list scheduling
    (HEFT: Topcuoglu, Hariri, Wu 2002), where data travel for nothing.
    """
    seconds: dict[str, float] = {}
    waiting: dict[str, float] = {}  # what is prepared -> the rank of the training that waits for it

    def rank(key: str) -> float:
        after = max([seconds.get(child, 0.0) for child in graph.children(key)], default=0.0)
        return seconds_of(graph, clock, key) + max(after, waiting.get(key, 0.0))

    prepared = [key for key, stage in graph.stages.items() if stage.phase == "prepare"]
    others = [key for key, stage in graph.stages.items() if stage.phase != "prepare"]
    groups: dict[int, tuple[tuple[tuple[str, ...], ...], float]] = {}  # one object for equal guards
    for key in reversed(others):
        seconds[key] = rank(key)
        if guards := graph.guards(key):
            groups[id(guards)] = guards, max(seconds[key], groups.get(id(guards), (guards, 0.0))[1])
    for guards, longest in groups.values():
        for guard in {guard for own in guards for guard in own}:
            waiting[guard] = max(waiting.get(guard, 0.0), longest)
    for key in reversed(prepared):
        seconds[key] = rank(key)
    return seconds


def seconds_of(graph: StageGraph, clock: Clock, key: str) -> float:
    """Return the expected seconds of a whole stage."""
    return clock.seconds(graph.stages[key], graph.resources(key), graph.vocabulary(key))
