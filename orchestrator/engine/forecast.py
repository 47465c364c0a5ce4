"""How long a run should take on a machine: the bound that no schedule beats, and what ours comes to."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from orchestrator.backends.local import Budget
from orchestrator.engine.agenda import Agenda
from orchestrator.engine.backfill import amounts
from orchestrator.plan.plan import Plan
from orchestrator.spec.cell import Resources

# Of plans with more stages to do only the bounds are told: list scheduling is then close to them.
MOST_SIMULATED = 500
# What a job costs besides its stages.
JOB_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of what a plan still has to do, on so many cores and GPUs."""

    cores: int
    work: float
    """Core-seconds of all stages."""
    path: float
    """The longest chain of stages, of which each needs the one before it."""
    makespan: float
    """The expected end: simulated, or at worst for a large plan."""
    simulated: bool
    gpus: int = 0
    gpu_work: float = 0.0
    """GPU-seconds of all stages."""

    @property
    def load(self) -> tuple[float, str]:
        """Seconds that the scarcer of cores and GPUs works, and which it is: core or GPU."""
        return max((self.work / self.cores, "core"), (self.gpu_work / max(self.gpus, 1), "GPU"))

    @property
    def bound(self) -> float:
        """What no schedule can be faster than: the load of the scarcer of cores and GPUs, or the longest chain."""
        return max(self.load[0], self.path)

    def to_json(self) -> dict[str, float | int | bool]:
        """Return it as JSON types, in seconds."""
        return {
            "cores": self.cores,
            "work": round(self.work, 1),
            "gpus": self.gpus,
            "gpu_work": round(self.gpu_work, 1),
            "longest_chain": round(self.path, 1),
            "bound": round(self.bound, 1),
            "makespan": round(self.makespan, 1),
            "simulated": self.simulated,
        }


def forecast(plan: Plan, budget: Budget) -> Forecast:
    """Return how long the stages that a run would work on take under the budget of a machine."""
    pending = plan.pending
    work, gpu_work, path = 0.0, 0.0, 0.0
    widest, most = 1.0, 1.0
    chains: dict[str, float] = {}
    for key in reversed(pending):
        seconds = plan.seconds(key)
        after = max([chains.get(child, 0.0) for child in plan.graph.children(key)], default=0.0)
        chains[key] = seconds + after
        path = max(path, chains[key])
        cores, _, gpus = amounts(plan.graph.resources(key), budget)
        work, gpu_work = work + seconds * cores, gpu_work + seconds * gpus
        widest, most = max(widest, cores), max(most, gpus)
    told = Forecast(budget.cores, work, path, 0.0, len(pending) <= MOST_SIMULATED, budget.gpus, gpu_work)
    if told.simulated:
        return replace(told, makespan=simulated(plan, budget))
    # While the longest chain waits for a job of w of n cores, n - w + 1 of them work (Graham 1969, where w is 1).
    busy = work / (budget.cores - widest + 1), gpu_work / max(budget.gpus - most + 1, 1.0)
    return replace(told, makespan=sum(busy) + path)


def simulated(plan: Plan, budget: Budget) -> float:
    """Return the seconds until all is done where jobs are chosen as by the engine and take what is expected."""
    graph = plan.graph
    agenda = Agenda(graph, plan.clock)
    left = set(plan.pending)
    done = set(graph.stages.keys() - left)
    lacking = {key: len(left.intersection(graph.stages[key].parents)) for key in left}
    ready = {key for key, count in lacking.items() if not count}
    busy: set[str] = set()
    running: list[tuple[float, int, str, Resources | None]] = []  # ends of stages; the last of a job frees its cores
    held: list[Resources] = []
    now = 0.0
    while left:
        agenda.look(budget, left.copy, busy & left, now)
        for chain, resources in agenda.choose(
            {key for key in ready if not _waits(plan, key, left)} - busy,
            done,
            busy,
            lambda chain: graph.resources(chain[0]),
            lambda wanted: budget.admits(held, wanted),
            len(left),
            spread=True,
        ):
            held.append(resources)
            busy.update(chain)
            end = now + JOB_SECONDS
            for key in chain:
                end += plan.seconds(key)
                heapq.heappush(running, (end, len(running), key, resources if key == chain[-1] else None))
        if not running:  # what is left waits for what is not to be done
            break
        now, _, key, freed = heapq.heappop(running)
        left.discard(key)
        done.add(key)
        ready.discard(key)
        for child in graph.children(key):
            if child in lacking:
                lacking[child] -= 1
                if not lacking[child]:
                    ready.add(child)
        if freed is not None:
            held.remove(freed)
    return now


def _waits(plan: Plan, key: str, left: set[str]) -> bool:
    """Return whether no cell that needs a training stage has all prepared that it needs."""
    guards = plan.graph.guards(key)
    return bool(guards) and all(not left.isdisjoint(own) for own in guards)
