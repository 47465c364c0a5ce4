"""The stage graph of a grid: equal keys are one stage, whichever cells need it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from orchestrator import registry
from orchestrator.catalog.kinds import computes
from orchestrator.grid.load import Grid, GridCell
from orchestrator.plan.stage import CellStages, Stage
from orchestrator.plan.stages import Lowering
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.providers import Use, of_all, uses_of
from orchestrator.spec.work import TrainWork

# One process runs the segments of a chain; longer chains only delay the other branches' scheduling.
MAX_CHAIN = 16
# Of phases that a grid says nothing of.
NO_RESOURCES = Resources()


@dataclass(frozen=True, slots=True)
class StageGraph:
    """Stages in topological order, the cells that need them, and what no sharing would have cost."""

    grid: Grid
    stages: Mapping[str, Stage]
    cells: Mapping[str, CellStages]
    users: Mapping[str, tuple[str, ...]]  # stage key -> ids of the cells that need it
    shared: bool = True
    _children: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _by_id: Mapping[str, GridCell] = field(default_factory=dict)
    _guards: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    def children(self, key: str) -> tuple[str, ...]:
        """Return the keys of the stages that need the artifact `key`."""
        return self._children.get(key, ())

    def vocabulary(self, key: str) -> int:
        """Return the size of the vocabulary of the cells that use a stage."""
        return self.cell(self.users[key][0]).cell.tokenizer.vocab_size

    def execution(self, key: str) -> Execution:
        """Return how the stage is run: by the first cell that needs it."""
        return self.cell(self.users[key][0]).cell.execution

    def resources(self, key: str) -> Resources:
        """Return the resources of the stage's phase."""
        return self.execution(key).resources.get(self.stages[key].phase, NO_RESOURCES)

    def guards(self, key: str) -> tuple[tuple[str, ...], ...]:
        """Return, for each cell that needs a training stage, what must be prepared first: all that is cheap can fail.

        They are no parents: they change nothing in what the stage makes. Cells with equal preparation count once.
        """
        return self._guards.get(key, ())

    def cell(self, cell_id: str) -> GridCell:
        """Return the grid's cell with this id."""
        return self._by_id[cell_id]

    def rank(self, key: str) -> int:
        """Return how early the grid wants the stage, 0 first: as early as any cell that needs it."""
        ranks = self.grid.ranks
        return min(ranks[cell] for cell in self.users[key]) if ranks else 0

    def uses(self) -> tuple[Use, ...]:
        """Return which packages and plugin files the stages use, and what of them; () as a rule."""
        if not registry.anything_outside():
            return ()
        return of_all(use for key, s in self.stages.items() for use in uses_of(s.work, self.execution(key).engine))

    def unshared(self) -> dict[str, tuple[int, int]]:
        """Return phase -> (stages, steps) if every cell ran alone."""
        totals: dict[str, tuple[int, int]] = {}
        for stages in self.cells.values():
            for stage in stages.stages:
                count, steps = totals.get(stage.phase, (0, 0))
                totals[stage.phase] = (count + 1, steps + stage.steps)
        return totals

    def sharing(self) -> dict[str, tuple[int, int]]:
        """Return phase -> (stages, steps) with every artifact made once."""
        totals: dict[str, tuple[int, int]] = {}
        for stage in self.stages.values():
            count, steps = totals.get(stage.phase, (0, 0))
            totals[stage.phase] = (count + 1, steps + stage.steps)
        return totals

    def chains(
        self, ready: Iterable[str], done: Collection[str], busy: Collection[str] = (), *, light: bool = False
    ) -> list[list[str]]:
        """Group `ready` stages into jobs, one list of keys each, in the order a process runs them.

        A training segment takes its first missing continuation with it (other branches fork from the committed
        state), preparation takes what only waits for it, evaluations of one cell go together with what only waits for
        them.
        `done` are committed keys, `busy` stages that some job has already. With `light` a job that needs no torch goes
        on with no stage that does: where another one starts at once, it has torch loaded already. Of two chains that
        could go on with the same stage, that of the earlier one of `ready` does.
        """
        taken = set(busy)
        jobs: list[list[str]] = []
        evaluations: list[list[str]] = []
        open_for: dict[tuple[str, Resources], list[str]] = {}
        for key in ready:
            if key in taken:
                continue
            stage = self.stages[key]
            if stage.phase == "evaluate":
                # States of one cell that wait together share the job's requests; those of other cells run beside it.
                group = (self.users[key][0], self.resources(key))
                if group not in open_for or len(open_for[group]) >= MAX_CHAIN:
                    open_for[group] = []
                    evaluations.append(open_for[group])
                    jobs.append(open_for[group])
                open_for[group].append(key)
                taken.add(key)
                continue
            chain = [key]
            taken.add(key)
            while len(chain) < MAX_CHAIN and (following := self._continuation(chain, done, taken, light=light)):
                chain.append(following)
                taken.add(following)
            jobs.append(chain)
        for together in evaluations:
            while len(together) < MAX_CHAIN and (following := self._continuation(together, done, taken, light=light)):
                together.append(following)
                taken.add(following)
        return jobs

    def _continuation(self, chain: list[str], done: Collection[str], taken: Collection[str], *, light: bool) -> str:
        """Return the stage that the process at the end of `chain` should go on with, or ""."""
        tail = chain[-1]
        light = light and not any(computes(self.stages[key].kind) for key in chain)
        # Weights are made by the first process alone: those beside it would train before there are any.
        asked = self.resources(tail)
        alone = self.stages[tail].kind != TrainWork.kind and asked.nodes * asked.processes > 1
        # Training continues its own state; preparation continues anything it has made possible.
        sources = [tail] if self.stages[tail].kind == "train" else chain
        for source in sources:
            for child in self.children(source):
                if child in done or child in taken or self.stages[child].phase != self.stages[tail].phase:
                    continue
                if self.resources(child) != asked or (light and computes(self.stages[child].kind)):
                    continue
                if alone and self.stages[child].kind == TrainWork.kind:
                    continue
                if all(parent in done or parent in chain for parent in self.stages[child].parents):
                    return child
        return ""


def build_graph(grid: Grid, *, share: bool = True) -> StageGraph:
    """Lower every cell and merge equal stages; `share=False` gives every cell its own training states."""
    lowering = Lowering()
    stages: dict[str, Stage] = {}
    cells: dict[str, CellStages] = {}
    users: dict[str, tuple[str, ...] | list[str]] = {}
    children: dict[str, tuple[str, ...] | list[str]] = {}
    guards: dict[str, tuple[tuple[str, ...], ...]] = {}
    intern: dict[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]] = {}  # one object for all equal guards
    private = {item.id: "" if share else item.id for item in grid.cells}
    for item in grid.cells:
        lowering.gather(item.cell, private=private[item.id])
    for item in grid.cells:
        lowered = lowering.cell(item.cell, private=private[item.id])
        cells[item.id] = lowered
        alone = (item.id,)
        for stage in lowered.stages:
            key = stage.key
            if key not in stages:
                stages[key] = stage
                users[key] = alone
                for parent in stage.parents:
                    _append(children, parent, (key,))
            else:
                _append(users, key, alone)
            if stage.steps:
                known = guards.get(key, ())
                if lowered.prepared not in known:
                    guards[key] = intern.setdefault((*known, lowered.prepared), (*known, lowered.prepared))
    return StageGraph(
        grid=grid,
        stages=stages,
        cells=cells,
        users=_tuples(users),
        shared=share,
        _children=_tuples(children),
        _by_id={item.id: item for item in grid.cells},
        _guards=guards,
    )


def _append(found: dict[str, tuple[str, ...] | list[str]], key: str, one: tuple[str, ...]) -> None:
    """Append to what is known of `key`; most keys get one, so that a list is made for the second."""
    known = found.get(key)
    if known is None:
        found[key] = one
    elif isinstance(known, list):
        known += one
    else:
        found[key] = [*known, *one]


def _tuples(found: dict[str, tuple[str, ...] | list[str]]) -> dict[str, tuple[str, ...]]:
    """Turn lists into tuples, in place where that saves a second dictionary of a million entries."""
    for key, known in found.items():
        if isinstance(known, list):
            found[key] = tuple(known)
    return cast("dict[str, tuple[str, ...]]", found)
