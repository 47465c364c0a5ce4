"""The sections of a grid read and checked as a whole: axes, conditions, exclusions, baseline; then the cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.catalog.routers import kind_of
from orchestrator.errors import did_you_mean
from orchestrator.files.bounds import bound, raising
from orchestrator.files.problems import Problems, brief
from orchestrator.grid.adaptive import Adaptive, more_seeds, read_adaptive
from orchestrator.grid.axes import AxisReader, Condition, read_condition, show_value
from orchestrator.grid.build import Builder
from orchestrator.grid.columns import every_column, sourced, unknown_column
from orchestrator.grid.document import GridDocument, Section
from orchestrator.grid.expand import Expander, GridCell, holds
from orchestrator.grid.factors import seed_names
from orchestrator.grid.merge import Merged
from orchestrator.grid.search import SearchSpec, read_search
from orchestrator.grid.sections import Sections
from orchestrator.grid.twins import same_science
from orchestrator.spec.cell import Cell


class Reading:
    """Reads the sections of a document, in turn; keeps what the grid needs."""

    def __init__(self, document: GridDocument, merged: Merged, folder: Path, problems: Problems) -> None:
        self.document = document
        self.merged = merged
        self.problems = problems
        self.baseline: dict[str, Any] = {}
        fields, active_width = self._active_width(merged.fields)
        builder = Builder(problems, merged.place, document.phase)
        sound = document.complete and bool(fields)
        self.base: Cell | None = builder.build(Cell, fields, ()) if sound else None
        self.reader = AxisReader(document, active_width, problems)
        self.products = self.reader.products()
        if not document.narrowed and not problems:
            self.reader.check_companions(self.products)
        self.when = self._when()
        self.exclude = self._conditions("exclude")
        self.priority = self._conditions("priority")
        self._baseline()
        self.search = self._search()
        self.adaptive: Adaptive | None = read_adaptive(document, problems)
        self.primary = tuple(self.names("primary"))
        self.runnable = self.text("runnable")
        self.description = self.text("description")
        self.lengths = builder.lengths
        self.folder = folder

    def cells(self) -> list[GridCell]:
        """Return the cells of all products."""
        if self.problems or self.base is None:
            return []
        self._check_size()
        if self.problems:
            return []
        seeds = seed_names(self.document.plain_seed)
        sections = Sections(self.base, self.lengths, self.folder, self.merged.said)
        expander = Expander(sections, self.merged, self._constant() - seeds, seeds)
        used: set[int] = set()

        def excluded(item: GridCell) -> bool:
            hits = [i for i, condition in enumerate(self.exclude) if holds(condition, item)]
            used.update(hits)
            return bool(hits)

        found: dict[str, GridCell] = {}
        twins: list[tuple[GridCell, GridCell, str]] = []
        for product in self.products or [[]]:
            for item in expander.expand(product, self.when, excluded if self.exclude else _never):
                first = found.setdefault(item.id, item)
                if first is not item and first.factors != item.factors:
                    twins.append((first, item, product[0].place))
        expander.report(self.problems)
        if not self.problems:
            place = next((product[0].place for product in self.products if product), self.document.path)
            twins += [(first, item, place) for first, item in same_science(found.values())]
        for first, item, place in twins if not self.problems else ():
            message = f"cells {first.name!r} and {item.name!r} differ in a factor but are the same science"
            self.problems.add(message, place, hint="remove one of them: a table would compare a result with itself")
        if not self.document.narrowed:
            for i, condition in enumerate(self.exclude):
                if i not in used:
                    hint = "remove it or correct its values"
                    self.problems.add(f"exclude {{{condition.text}}} matches no cell", condition.place, "exclude", hint)
        self._check_baseline(found.values())
        self._check_columns([item.cell for item in found.values()])
        if not found and not self.problems:
            self.problems.add("every cell is excluded", self.document.path, "exclude")
        return list(found.values())

    def _check_size(self) -> None:
        """Report a grid that is too large to be meant, before it is expanded."""
        sizes = [(math.prod(len(axis.choices) for axis in axes), axes) for axes in self.products]
        count, most = sum(size for size, _ in sizes), bound("MOEGRID_MAX_CELLS")
        if count > most:
            axes = max(sizes, key=lambda pair: pair[0])[1]
            widths = " x ".join(f"{len(axis.choices)} {', '.join(axis.names)}" for axis in axes)
            message = f"the axes have {count:,} combinations, more than {most:,}: {widths}"
            self.problems.add(message, axes[0].place, "factors", raising("MOEGRID_MAX_CELLS", count))

    def reserve(self, cells: Iterable[GridCell]) -> list[GridCell]:
        """Return the cells beyond `cells` that an adaptive number of seeds may add, seed by seed."""
        if self.adaptive is None or self.problems:
            return []
        further = Reading(more_seeds(self.document, self.adaptive), self.merged, self.folder, self.problems)
        known = {item.id for item in cells}
        return [item for item in further.cells() if item.id not in known]

    def _constant(self) -> frozenset[str]:
        """Return the factors that have one and the same value in every product."""
        values: dict[str, set[str]] = {}
        for product in self.products:
            for axis in product:
                for choice in axis.choices:
                    for name, value in choice.values:
                        values.setdefault(name, set()).add(show_value(value))
        everywhere = [{name for axis in product for name in axis.names} for product in self.products]
        conditional = set(self.when)
        return frozenset(
            name
            for name, shown in values.items()
            if len(shown) == 1 and name not in conditional and all(name in names for names in everywhere)
        )

    def _active_width(self, fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Replace `model.active_width` by the expert width it means; return the fields and the active width.

        Of `active_width` and `moe.expert_width` the one that was written later counts.
        """
        model = fields.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("moe"), dict):
            return fields, 0
        model = dict(model)
        active = model.pop("active_width", None)
        moe = model["moe"]
        active_experts = [moe.get("top_k", 2), moe.get("shared_experts") or 0]
        if not all(type(number) is int for number in active_experts):
            return {**fields, "model": model}, 0
        number = sum(active_experts)
        place = self.merged.place(("model", "active_width"))
        if active is not None and (type(active) is not int or active < 1):
            message = f"model.active_width must be a whole number of at least 1, not {brief(active)}"
            self.problems.add(message, place, "model.active_width")
            return {**fields, "model": model}, 0
        width = moe.get("expert_width")
        widths = (("model", "active_width"), ("model", "moe", "expert_width"))
        by_all, by_one = (self.merged.ranks.get(path, -1) for path in widths)
        if active is None or by_one > by_all:
            return {**fields, "model": model}, width * number if isinstance(width, int) else 0
        if by_one == by_all and active != width * number:
            message = f"model.active_width {active} and {number} active experts of expert_width {width} disagree"
            self.problems.add(message, place, "model.active_width", "set one of the two")
            return {**fields, "model": model}, 0
        if number < 1 or active % number:
            message = f"model.active_width {active} is not divisible by the {number} active experts (top_k + shared)"
            self.problems.add(message, place, "model.active_width", "choose a multiple")
            return {**fields, "model": model}, 0
        return {**fields, "model": {**model, "moe": {**moe, "expert_width": active // number}}}, active

    def _when(self) -> dict[str, Condition]:
        section = self.document.sections.get("when", Section({}, {}))
        axes = {name for product in self.products for axis in product for name in axis.names}
        conditions = {}
        for name, data in section.data.items():
            place = section.place(name)
            if self.reader.factor(str(name), place) is None:
                continue
            if name not in axes and not self.problems:
                hint = did_you_mean(name, axes, "axes")
                self.problems.add(f"when names {name!r}, which is no axis of this grid", place, f"when.{name}", hint)
            if isinstance(data, Mapping) and name in data:
                self.problems.add(f"when makes {name!r} depend on itself", place, f"when.{name}")
                continue
            condition = read_condition(self.reader, data, section, (name,), f"when.{name}")
            if condition is not None:
                conditions[str(name)] = condition
        return conditions

    def ranks(self, cells: Iterable[GridCell]) -> dict[str, int]:
        """Return cell id -> the number of the first priority that the cell meets, of those without one the highest.

        Empty when the grid names no priorities.
        """
        if not self.priority:
            return {}
        met = {item.id: [i for i, wanted in enumerate(self.priority) if holds(wanted, item)] for item in cells}
        for i in set(range(len(self.priority))).difference(*met.values()) if not self.document.narrowed else ():
            condition, hint = self.priority[i], "remove it or correct its values"
            self.problems.add(f"priority {{{condition.text}}} matches no cell", condition.place, "priority", hint)
        return {cell_id: min(hits, default=len(self.priority)) for cell_id, hits in met.items()}

    def _conditions(self, key: str) -> list[Condition]:
        """Return a section that is a list of conditions."""
        section = self.document.sections.get(key, Section([], {}))
        if not isinstance(section.data, list):
            self.problems.add(f"{key} must be a list, not {brief(section.data)}", section.place(), key)
            return []
        found = [read_condition(self.reader, data, section, (i,), key) for i, data in enumerate(section.data)]
        return [condition for condition in found if condition is not None]

    def _search(self) -> SearchSpec | None:
        section = self.document.sections.get("search")
        axes = {name for product in self.products for axis in product for name in axis.names}
        return read_search(self.reader, section, axes) if section else None

    def _baseline(self) -> None:
        section = self.document.sections.get("baseline", Section({}, {}))
        for name, value in section.data.items():
            place = section.place(name)
            factor = self.reader.factor(str(name), place)
            choice = self.reader.choice((factor,), [value], place) if factor else None
            if choice is not None:
                self.baseline[str(name)] = choice.values[0][1]

    def _check_baseline(self, cells: Iterable[GridCell]) -> None:
        if self.baseline and not any(
            all(item.factors.get(name) == value for name, value in self.baseline.items()) for item in cells
        ):
            section = self.document.sections["baseline"]
            text = ", ".join(f"{name}: {show_value(value)}" for name, value in self.baseline.items())
            hint = "name values of this grid's factors"
            self.problems.add(f"baseline {{{text}}} matches no cell", section.place(), "baseline", hint)

    def _check_columns(self, cells: Sequence[Cell]) -> None:
        """Report a named metric that no evaluation of the grid makes; none of them would be noticed before its end."""
        if self.problems or not cells:
            return
        alike = {(id(cell.evaluate), kind_of(cell.model.moe).routes): cell for cell in cells}
        known = [sourced(cell) for cell in alike.values()]
        for i, name in enumerate(self.primary):
            hint = unknown_column(name, known)
            # On the command line fewer suites may be evaluated than the grid's columns are from.
            if hint is not None and not (self.document.narrowed and name in every_column()):
                section = self.document.sections["primary"]
                message = f"primary names {name!r}, which no evaluation of this grid makes"
                self.problems.add(message, section.place(i), "primary", hint)
        wanted: list[tuple[str, str, float | None]] = []
        if self.search is not None:
            wanted += [("search", self.search.metric, at) for at in self.search.fractions]
        if self.adaptive is not None:
            wanted.append(("adaptive", self.adaptive.metric, None))
        for key, name, at in wanted:
            hint = unknown_column(name, cells, at)
            if hint is not None:
                when = f" at {at:g} of its steps" if at is not None and at < 1.0 else ""
                message = f"{key}.metric {name!r} is made by no evaluation of this grid{when}"
                self.problems.add(message, self.document.sections[key].place("metric"), f"{key}.metric", hint)
                break

    def text(self, key: str) -> str:
        """Return a section that is one text."""
        section = self.document.sections.get(key, Section("", {}))
        if isinstance(section.data, str):
            return section.data
        hint = "put it in quotes" if isinstance(section.data, (int, float)) else ""
        self.problems.add(f"{key} must be text, not {brief(section.data)}", section.place(), key, hint)
        return ""

    def names(self, key: str) -> list[str]:
        """Return a section that is a list of names."""
        section = self.document.sections.get(key, Section([], {}))
        value = section.data if isinstance(section.data, list) else [section.data]
        if all(isinstance(name, str) and name for name in value):
            return value
        self.problems.add(f"{key} must be a list of names, not {brief(section.data)}", section.place(), key)
        return []


def _never(_: GridCell) -> bool:
    return False
