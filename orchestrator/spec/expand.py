"""Expansion: products of axes become cells; a section of a cell is built once for all the cells that share it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path as FilePath
from typing import Any

from orchestrator.spec.axes import ABSENT, Axis, Choice, Condition
from orchestrator.spec.cell import Cell, EvaluateSpec, TrainSpec
from orchestrator.spec.factors import replace_path
from orchestrator.spec.fields import Path, fields_of
from orchestrator.spec.identity import digest
from orchestrator.spec.merge import Merged
from orchestrator.spec.model import ModelSpec, resolve_model
from orchestrator.spec.problems import Mistake, Problems
from orchestrator.spec.sources import source_digest
from orchestrator.spec.units import Length
from orchestrator.spec.validate import Finding, cell_findings, normal_train, section_findings, why_not

SECTIONS = tuple(fields_of(Cell))
SCIENCE = tuple(name for name in SECTIONS if name != "execution")


@dataclasses.dataclass(frozen=True, slots=True)
class GridCell:
    """One cell of a grid. `id` is 12 hex digits of its science digest; `setting` is its name without seeds.

    `factors` holds the values the grid gives it; a factor it does not name has the recipe's value.
    """

    id: str
    name: str
    setting: str
    factors: Mapping[str, Any]
    cell: Cell


@dataclasses.dataclass(slots=True)
class Built:
    """A finished section, its digest, and what is wrong with it."""

    value: Any
    digest: str
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Where a finding was first met, in which cell, and in how many."""

    place: str
    name: str
    hint: str
    count: int


class Expander:
    """Builds the cells of products over one base cell. Problems are collected with the first cell that has each.

    `unnamed` factors have one value in the whole grid and stay out of the cells' names.
    """

    def __init__(
        self,
        base: Cell,
        lengths: Mapping[str, Length],
        merged: Merged,
        folder: FilePath,
        seeds: frozenset[str],
        problems: Problems,
    ) -> None:
        self.base = base
        self.lengths = lengths
        self.merged = merged
        self.folder = folder
        self.seeds = seeds
        self.problems = problems
        self.unnamed: frozenset[str] = frozenset()
        self._sections: dict[str, dict[Any, Built]] = {name: {} for name in SECTIONS}
        self._checked: set[Any] = set()
        self._found: dict[tuple[Path, str], Found] = {}
        self._base_findings: list[Finding] | None = None

    def expand(
        self, axes: list[Axis], when: Mapping[str, Condition], excluded: Callable[[GridCell], bool]
    ) -> Iterator[GridCell]:
        """Yield the cells of one product, in order."""
        assemble = self._assembler(axes)
        combos: Any = itertools.product(*(axis.choices for axis in axes))
        if any(name in when for axis in axes for name in axis.names):
            combos = self._conditional(axes, when, combos, assemble)
        for combo in combos:
            item = assemble(combo)
            if not excluded(item):
                self._check(axes, combo, item)
                yield item

    def _conditional(
        self, axes: list[Axis], when: Mapping[str, Condition], combos: Any, assemble: Any
    ) -> Iterator[Any]:
        """Leave a conditional axis out of the combinations in which its condition does not hold."""
        rules = [(i, when[name]) for name in when for i, axis in enumerate(axes) if name in axis.names]
        seen = set()
        for combo in combos:
            partial = list(combo)
            for i, _ in rules:
                partial[i] = ABSENT
            for i, condition in rules:
                if holds(condition, assemble(tuple(partial))):
                    partial[i] = combo[i]
            result = tuple(partial)
            if result not in seen:
                seen.add(result)
                yield result

    def _assembler(self, axes: list[Axis]) -> Callable[[tuple[Choice, ...]], GridCell]:
        """Return a function from one choice per axis to a cell."""
        touched: dict[str, list[int]] = {name: [] for name in SECTIONS}
        for i, axis in enumerate(axes):
            for name in {path[0] for factor in axis.factors for path in factor.paths}:
                touched[name].append(i)
        parts = [self._section(name, ()) if not touched[name] else None for name in SECTIONS]
        varying = [
            (slot, name, itemgetter(*touched[name]), self._sections[name])
            for slot, name in enumerate(SECTIONS)
            if touched[name]
        ]
        science = [slot for slot, name in enumerate(SECTIONS) if name in SCIENCE]
        named = [i for i, axis in enumerate(axes) if not self.unnamed.issuperset(axis.names)]
        unseeded = [i for i in named if not self.seeds.issuperset(axes[i].names)]

        def assemble(combo: tuple[Choice, ...]) -> GridCell:
            for slot, name, choices_of, cache in varying:
                choices = choices_of(combo)
                part = cache.get(choices)
                if part is None:
                    part = self._section(name, choices)
                parts[slot] = part
            key = hashlib.sha256("".join([parts[slot].digest for slot in science]).encode()).hexdigest()  # type: ignore[union-attr]
            factors: dict[str, Any] = {}
            for choice in combo:
                factors.update(choice.values)
            return GridCell(
                key[:12],
                " ".join([combo[i].label for i in named if combo[i].label]) or "base",
                " ".join([combo[i].label for i in unseeded if combo[i].label]) or "base",
                factors,
                Cell(*[part.value for part in parts]),  # type: ignore[union-attr]
            )

        return assemble

    def _section(self, name: str, choices: Choice | tuple[Choice, ...]) -> Built:
        """Build a section under `choices`, once."""
        cache = self._sections[name]
        if choices in cache:
            return cache[choices]
        value = getattr(self.base, name)
        length = self.lengths.get(name)
        findings: list[Finding] = []
        for choice in (choices,) if isinstance(choices, Choice) else choices:
            for path, new in choice.assignments:
                if path[0] != name:
                    continue
                if value is None:
                    findings.append((path, f"the cell has no {name} phase", "choose another recipe or factor"))
                    break
                if path[1:] == ("steps",) and isinstance(value, TrainSpec):
                    length = new if isinstance(new, Length) else None
                if not isinstance(new, Length):
                    value = replace_path(value, path[1:], new)
        value = self._finish(name, value, length, findings)
        findings.extend(section_findings(name, value))
        cache[choices] = Built(value, digest(_science(value)), tuple(findings))
        return cache[choices]

    def _finish(self, name: str, value: Any, length: Length | None, findings: list[Finding]) -> Any:
        """Fill in what is derived: steps from a length, digests of sources, the preset's values."""
        if isinstance(value, ModelSpec):
            try:
                return resolve_model(value)
            except ValueError:
                return value  # section_findings says why
        if isinstance(value, TrainSpec):
            if length is not None:
                try:
                    value = dataclasses.replace(value, steps=length.steps(value))
                except Mistake as mistake:
                    findings.append(((name, "steps"), mistake.message, mistake.hint))
            data = value.data
            pinned = self._pin((name, "data", "source"), data.source, data.revision, data.digest, findings)
            source = data.source
            if source.startswith("file://"):
                source = f"file://{self.folder / FilePath(source.removeprefix('file://')).expanduser()}"
            return dataclasses.replace(value, data=dataclasses.replace(data, source=source, digest=pinned))
        if isinstance(value, EvaluateSpec):
            pinned = self._pin((name, "source"), value.source, "", value.digest, findings)
            return dataclasses.replace(value, digest=pinned)
        return value

    def _pin(self, path: Path, source: str, revision: str, given: str, findings: list[Finding]) -> str:
        try:
            found = source_digest(source, revision, self.folder)
        except Mistake as mistake:
            findings.append((path, mistake.message, mistake.hint))
            return ""
        if given not in ("", found):
            message = f"source {source!r} has the digest {found[:12]}, not {given[:12]}"
            findings.append((path, message, "correct or remove the digest"))
        return found

    def _check(self, axes: list[Axis], combo: tuple[Choice, ...], item: GridCell) -> None:
        """Collect the findings of a cell; equal sections are looked at once."""
        cell = item.cell
        mark = (
            id(cell.model),
            id(cell.pretrain),
            id(cell.finetune),
            id(cell.evaluate),
            id(cell.tokenizer),
            tuple(item.factors),
        )
        if mark in self._checked:
            return
        self._checked.add(mark)
        findings = [finding for built in self._parts(axes, combo) for finding in built.findings]
        findings = findings or list(cell_findings(cell))
        for finding in findings:
            self._note(finding, axes, combo, item)
        for axis, choice in zip(axes, combo, strict=True) if not findings else ():
            # Paired factors are chosen together: one that matters is enough.
            reasons = [why_not(cell, factor.paths[0]) for factor in axis.factors] if choice is not ABSENT else [""]
            if all(reasons):
                names = ", ".join(axis.names)
                message = f"factor {names!r} does not apply: {reasons[0]}"
                hint = f"restrict it with when: {{{axis.names[0]}: {{...}}}} or remove it"
                self._note((axis.factors[0].paths[0], message, hint), axes, combo, item)

    def _parts(self, axes: list[Axis], combo: tuple[Choice, ...]) -> Iterator[Built]:
        for name in SECTIONS:
            touching = tuple(
                choice
                for axis, choice in zip(axes, combo, strict=True)
                if any(path[0] == name for factor in axis.factors for path in factor.paths)
            )
            yield self._section(name, touching[0] if len(touching) == 1 else touching)

    def _note(self, finding: Finding, axes: list[Axis], combo: tuple[Choice, ...], item: GridCell) -> None:
        """Keep a finding with its place: the axis that sets its field, else one of its section, else the field."""
        path, message, hint = finding
        first = self._found.get((path, message))
        if first:
            self._found[(path, message)] = dataclasses.replace(first, count=first.count + 1)
            return
        nearness = [0]
        places = [self.merged.place(path)]
        for axis, choice in zip(axes, combo, strict=True):
            for assigned, _ in choice.assignments:
                nearness.append(_nearness(assigned, path) if finding not in self._of_base() else assigned == path)
                places.append(axis.place)
        best = max(nearness)
        name = "" if finding in self._of_base() else item.name
        self._found[(path, message)] = Found(places[nearness.index(best)], name, hint, 1)

    def _of_base(self) -> list[Finding]:
        """Return what is wrong with the cell before any factor is set."""
        if self._base_findings is None:
            parts = [self._section(name, ()) for name in SECTIONS]
            findings = [finding for built in parts for finding in built.findings]
            self._base_findings = findings or list(cell_findings(Cell(*[built.value for built in parts])))
        return self._base_findings

    def report(self) -> None:
        """Turn what was found into problems."""
        for (path, message), found in self._found.items():
            where = f" in cell {found.name!r}" if found.name not in ("", "base") else ""
            more = f" and {found.count - 1} more" if where and found.count > 1 else ""
            self.problems.add(message + where + more, found.place, ".".join(path), found.hint)


def _nearness(assigned: Path, path: Path) -> int:
    """Return how near an assigned field is to `path`: 2 the same or inside, 1 of the same section, 0 elsewhere."""
    if assigned[: len(path)] == path and len(path) > 1:
        return 2
    return int(assigned[0] == path[0])


def _science(value: Any) -> Any:
    """Return what of a section defines a cell: schedules as what they do, without what is measured when."""
    if isinstance(value, TrainSpec):
        return normal_train(value) if not list(section_findings("", value)) else value
    if isinstance(value, EvaluateSpec):
        return dataclasses.replace(value, at=(), suites=())
    return value


def holds(condition: Condition, item: GridCell) -> bool:
    """Return whether every factor of `condition` has one of its values in the cell."""
    for factor, values in condition.terms:
        value = item.factors[factor.name] if factor.name in item.factors else factor.read(item.cell)
        if (list(value) if isinstance(value, tuple) else value) not in values:
            return False
    return True
