"""Expansion: products of axes become cells; a section of a cell is built once for all the cells that share it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from orchestrator.files.problems import Problems
from orchestrator.grid.axes import ABSENT, Axis, Choice, Condition
from orchestrator.grid.merge import Merged
from orchestrator.grid.phase_rules import Finding
from orchestrator.grid.sections import NEW_PHASES, SCIENCE, SECTIONS, Built, Sections, sections_of
from orchestrator.grid.validate import cell_findings, why_not
from orchestrator.spec.cell import Cell
from orchestrator.spec.fields import Path

Combination = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class GridCell:
    """One cell of a grid. `id` is 12 hex digits of its science digest; `setting` is its name without seeds.

    `factors` holds the values the grid gives it; a factor it does not name has the recipe's value.
    """

    id: str
    name: str
    setting: str
    factors: Mapping[str, Any]
    cell: Cell


def holds(condition: Condition, item: GridCell) -> bool:
    """Return whether every factor of `condition` has one of its values in the cell."""
    for factor, values in condition.terms:
        value = item.factors[factor.name] if factor.name in item.factors else factor.read(item.cell)
        if (list(value) if isinstance(value, tuple) else value) not in values:
            return False
    return True


class Product:
    """The cells of one product. `unnamed` factors stay out of names, `seeds` out of settings."""

    def __init__(self, axes: list[Axis], sections: Sections, unnamed: frozenset[str], seeds: frozenset[str]) -> None:
        self.axes = axes
        self._sections = sections
        touched: dict[str, list[int]] = {name: [] for name in SECTIONS}
        for i, axis in enumerate(axes):
            for name in {name for path in axis.paths for name in sections_of(path)}:
                touched[name].append(i)
        self._fixed = [sections.get(name) for name in SECTIONS]
        self._varying = [
            (slot, name, itemgetter(*touched[name])) for slot, name in enumerate(SECTIONS) if touched[name]
        ]
        self._named = [i for i, axis in enumerate(axes) if not unnamed.issuperset(axis.names)]
        self._unseeded = [i for i in self._named if not seeds.issuperset(axes[i].names)]

    def parts(self, combination: Combination) -> list[Built]:
        """Return the sections of a combination, in order."""
        parts = self._fixed.copy()
        for slot, name, choices_of in self._varying:
            parts[slot] = self._sections.get(name, choices_of(combination))
        return parts

    def cell(self, combination: Combination) -> GridCell:
        """Return the cell of a combination."""
        parts = self.parts(combination)
        own = zip(SCIENCE, parts, strict=False)
        science = "".join([part.digest for name, part in own if part.value is not None or name not in NEW_PHASES])
        factors: dict[str, object] = {}
        for choice in combination:
            factors.update(choice.values)
        return GridCell(
            hashlib.sha256(science.encode()).hexdigest()[:12],
            " ".join([combination[i].label for i in self._named if combination[i].label]) or "base",
            " ".join([combination[i].label for i in self._unseeded if combination[i].label]) or "base",
            factors,
            Cell(*[part.value for part in parts]),
        )

    def combinations(self, when: Mapping[str, Condition]) -> Iterator[Combination]:
        """Yield one choice per axis; a conditional axis is left out where its condition does not hold."""
        every = itertools.product(*(axis.choices for axis in self.axes))
        rules = [(i, when[name]) for name in when for i, axis in enumerate(self.axes) if name in axis.names]
        if not rules:
            yield from every
            return
        seen = set()
        for combination in every:
            partial = list(combination)
            for i, _ in rules:
                partial[i] = ABSENT
            for i, condition in rules:
                if holds(condition, self.cell(tuple(partial))):
                    partial[i] = combination[i]
            result = tuple(partial)
            if result not in seen:
                seen.add(result)
                yield result


@dataclass(frozen=True, slots=True)
class Found:
    """Where a finding was first met, in which cell, and in how many."""

    place: str
    name: str
    hint: str
    count: int


class Expander:
    """Expands products and collects what is wrong with their cells, each finding with the first cell that has it."""

    def __init__(self, sections: Sections, merged: Merged, unnamed: frozenset[str], seeds: frozenset[str]) -> None:
        self.sections = sections
        self.merged = merged
        self.unnamed = unnamed
        self.seeds = seeds
        self._checked: set[Any] = set()
        self._found: dict[tuple[Path, str], Found] = {}
        parts = [sections.get(name) for name in SECTIONS]
        # What is wrong before any factor is set; it is no cell's fault.
        self._base = [finding for part in parts for finding in part.findings]
        self._base = self._base or list(cell_findings(Cell(*[part.value for part in parts])))

    def expand(
        self, axes: list[Axis], when: Mapping[str, Condition], excluded: Callable[[GridCell], bool]
    ) -> Iterator[GridCell]:
        """Yield the cells of one product, in order."""
        product = Product(axes, self.sections, self.unnamed, self.seeds)
        for combination in product.combinations(when):
            item = product.cell(combination)
            if not excluded(item):
                self._check(product, combination, item)
                yield item

    def _check(self, product: Product, combination: Combination, item: GridCell) -> None:
        """Collect the findings of a cell; equal sections with the same factors are looked at once."""
        cell = item.cell
        parts = (cell.model, cell.tokenizer, cell.evaluate, cell.execution, *cell.phases.values())
        mark = (*map(id, parts), *item.factors)
        if mark in self._checked:
            return
        self._checked.add(mark)
        findings = [finding for part in product.parts(combination) for finding in part.findings]
        findings = findings or list(cell_findings(cell)) or list(_without_effect(product.axes, combination, cell))
        for finding in findings:
            self._note(finding, product.axes, combination, item)

    def _note(self, finding: Finding, axes: list[Axis], combination: Combination, item: GridCell) -> None:
        """Keep a finding with its place: the axis that sets its field, else one of its section, else the field."""
        path, message, hint = finding
        known = self._found.get((path, message))
        if known:
            self._found[path, message] = replace(known, count=known.count + 1)
            return
        of_base = finding in self._base
        best, place = 0, self.merged.place(path)
        for axis, choice in zip(axes, combination, strict=True):
            for assigned, _ in choice.assignments:
                nearness = int(assigned == path) if of_base else _nearness(assigned, path)
                if nearness > best:
                    best, place = nearness, choice.places.get(assigned, axis.place)
        self._found[path, message] = Found(place, "" if of_base else item.name, hint, 1)

    def report(self, problems: Problems) -> None:
        """Add what was found to `problems`."""
        for (path, message), found in self._found.items():
            where = f" in cell {found.name!r}" if found.name not in ("", "base") else ""
            more = f" and {found.count - 1} more" if where and found.count > 1 else ""
            problems.add(message + where + more, found.place, ".".join(path), found.hint)


def _without_effect(axes: Iterable[Axis], combination: Combination, cell: Cell) -> Iterator[Finding]:
    """Yield the factors that change nothing in `cell`."""
    for axis, choice in zip(axes, combination, strict=True):
        if choice is ABSENT:
            continue
        # Paired factors are chosen together: one that matters is enough.
        reasons = [why_not(cell, factor.paths[0]) if factor.paths else "" for factor in axis.factors]
        if all(reasons):
            message = f"factor {', '.join(axis.names)!r} does not apply: {reasons[0]}"
            hint = f"restrict it with when: {{{axis.names[0]}: {{...}}}} or remove it"
            yield axis.factors[0].paths[0], message, hint


def _nearness(assigned: Path, path: Path) -> int:
    """Return how near an assigned field is to `path`: 2 the same or inside, 1 of the same section, 0 elsewhere."""
    if assigned[: len(path)] == path and len(path) > 1:
        return 2
    return int(assigned[0] == path[0])
