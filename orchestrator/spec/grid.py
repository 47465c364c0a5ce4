"""A grid: the cells of one YAML file at one scale, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.axes import AxisReader, Condition, read_condition, show_value
from orchestrator.spec.cell import Cell
from orchestrator.spec.document import GridDocument, Loader, Section, find_grid
from orchestrator.spec.expand import SECTIONS, Expander, GridCell, holds
from orchestrator.spec.factors import find_factor, seed_names
from orchestrator.spec.fields import Builder, fields_of
from orchestrator.spec.identity import digest, plain
from orchestrator.spec.merge import Merged, merge
from orchestrator.spec.problems import Mistake, Problems, did_you_mean
from orchestrator.spec.work import build

__all__ = ["Grid", "GridCell", "grid_from_json", "load_grid"]

_HINTS = {name: field.hint for name, field in fields_of(Cell).items()}


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a grid at one scale.

    `factors` are the names of its axes in order, `seed` is the field of `Seeds` that plain `seed` means, `runnable` is ""
    or the reason why this scale cannot run on the local machine. `digest` identifies this version of the grid:
    the sha256 of `resolved`, from which `grid_from_json` rebuilds it.
    """

    name: str
    description: str
    path: str
    scale: str
    recipe: str
    cells: tuple[GridCell, ...]
    factors: tuple[str, ...]
    seed: str
    baseline: Mapping[str, Any]
    primary: tuple[str, ...]
    runnable: str
    digest: str
    resolved: Mapping[str, Any]

    def is_baseline(self, cell: GridCell) -> bool:
        """Return whether `cell` belongs to the baseline that the others are compared to."""
        return bool(self.baseline) and all(cell.factors.get(name) == value for name, value in self.baseline.items())


def load_grid(
    name_or_path: str,
    *,
    scale: str = "tiny",
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> Grid:
    """Return the grid in a file, or in grids/ by name, at `scale`.

    `overrides` are command-line settings (`factors.seed=[0,1]`, `set.finetune.lr=1e-4`, `at=[1.0]`); `only` keeps the cells with
    a factor's value (`freeze=none->router`; several values of one factor: any of them) or an id; `seeds` replaces the values of plain `seed`.
    Raises GridError with everything that is wrong.
    """
    problems = Problems()
    path = find_grid(name_or_path)
    document = Loader(problems).load(path, scale, overrides)
    if seeds is not None:
        _set_seeds(document, list(seeds))
    merged = merge(document, problems)
    reading = _Reading(document, merged, path.parent, problems)
    cells = reading.cells(strict=not overrides and seeds is None)
    if not problems:
        cells = _filter(cells, only, document, problems)
    problems.raise_if_any()
    axes = [name for product in reading.products for axis in product for name in axis.names]
    present = {name for item in cells for name in item.factors}
    resolved = {
        "name": document.name,
        "description": reading.text("description"),
        "scale": scale,
        "recipe": document.base,
        "factors": [name for name in dict.fromkeys(axes) if name in present],
        "seed": document.plain_seed,
        "baseline": reading.baseline,
        "primary": reading.names("primary"),
        "runnable": reading.text("runnable"),
        **_intern(cells),
    }
    return _grid(resolved, tuple(cells), document.path)


def grid_from_json(resolved: Mapping[str, Any]) -> Grid:
    """Rebuild a grid from its `resolved` form."""
    parts = {
        name: {key: build(_HINTS[name], value) for key, value in resolved["parts"][name].items()} for name in SECTIONS
    }
    cells = tuple(
        GridCell(
            item["id"],
            item["name"],
            item["setting"],
            item["factors"],
            Cell(**{name: parts[name][key] for name, key in zip(SECTIONS, item["parts"], strict=True)}),
        )
        for item in resolved["cells"]
    )
    return _grid(resolved, cells, "")


def _grid(resolved: Mapping[str, Any], cells: tuple[GridCell, ...], path: str) -> Grid:
    return Grid(
        name=resolved["name"],
        description=resolved["description"],
        path=path,
        scale=resolved["scale"],
        recipe=resolved["recipe"],
        cells=cells,
        factors=tuple(resolved["factors"]),
        seed=resolved["seed"],
        baseline=resolved["baseline"],
        primary=tuple(resolved["primary"]),
        runnable=resolved["runnable"],
        digest=digest(resolved),
        resolved=resolved,
    )


def _intern(cells: Sequence[GridCell]) -> dict[str, Any]:
    """Return the cells as JSON types with every distinct section written once."""
    keys: dict[int, str] = {}
    parts: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    rows = []
    for item in cells:
        row = []
        for name in SECTIONS:
            section = getattr(item.cell, name)
            key = keys.get(id(section))
            if key is None:
                value = plain(section)
                key = keys[id(section)] = digest(value)[:16]
                parts[name][key] = value
            row.append(key)
        rows.append({"id": item.id, "name": item.name, "setting": item.setting, "factors": item.factors, "parts": row})
    return {"parts": parts, "cells": rows}


def _set_seeds(document: GridDocument, seeds: list[int]) -> None:
    """Give every product the seeds of the command line."""
    factors = document.sections.setdefault("factors", Section({}, {}))
    also = document.sections.get("also", Section([], {}))
    for product in [factors.data, *(also.data if isinstance(also.data, list) else [])]:
        if isinstance(product, dict):
            product["seed"] = seeds


class _Reading:
    """Reads the sections of a document, in turn; keeps what the grid needs."""

    def __init__(self, document: GridDocument, merged: Merged, folder: Path, problems: Problems) -> None:
        self.document = document
        self.merged = merged
        self.problems = problems
        self.baseline: dict[str, Any] = {}
        fields, active_width = self._active_width(merged.fields)
        builder = Builder(problems, merged.place)
        self.base: Cell | None = builder.build(Cell, fields, ()) if fields else None
        self.reader = AxisReader(document, active_width, problems)
        self.products = self.reader.products()
        self.when = self._when()
        self.exclude = self._exclude()
        self._baseline()
        self.names("primary")
        self.text("runnable"), self.text("description")
        seeds = seed_names(document.plain_seed)
        if self.base is not None:
            self.expander = Expander(self.base, builder.lengths, merged, folder, seeds, problems)

    def cells(self, strict: bool) -> list[GridCell]:
        """Return the cells of all products; with `strict` an exclusion that excludes nothing is a problem."""
        if self.problems or self.base is None:
            return []
        used: set[int] = set()

        def excluded(item: GridCell) -> bool:
            hits = [i for i, condition in enumerate(self.exclude) if holds(condition, item)]
            used.update(hits)
            return bool(hits)

        found: dict[str, GridCell] = {}
        for product in self.products or [[]]:
            for item in self.expander.expand(product, self.when, excluded if self.exclude else _never):
                first = found.setdefault(item.id, item)
                if first is not item and first.factors != item.factors:
                    self.problems.add(
                        f"cells {first.name!r} and {item.name!r} differ in a factor but are the same science",
                        product[0].place if product else self.document.path,
                        hint="remove one of them: a table would compare a result with itself",
                    )
        self.expander.report()
        if strict:
            for i, condition in enumerate(self.exclude):
                if i not in used:
                    hint = "remove it or correct its values"
                    self.problems.add(f"exclude {{{condition.text}}} matches no cell", condition.place, "exclude", hint)
        self._check_baseline(found.values())
        if not found and not self.problems:
            self.problems.add("every cell is excluded", self.document.path, "exclude")
        return list(found.values())

    def _active_width(self, fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Replace `model.active_width` by the expert width it means; return the fields and the active width."""
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
        if active is None:
            width = moe.get("expert_width")
            return {**fields, "model": model}, width * number if isinstance(width, int) else 0
        place = self.merged.place(("model", "active_width"))
        if type(active) is not int or active < 1 or number < 1 or active % number:
            message = f"model.active_width {active!r} is not divisible by the {number} active experts (top_k + shared)"
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

    def _exclude(self) -> list[Condition]:
        section = self.document.sections.get("exclude", Section([], {}))
        if not isinstance(section.data, list):
            self.problems.add(f"exclude must be a list, not {section.data!r}", section.place(), "exclude")
            return []
        found = [read_condition(self.reader, data, section, (i,), "exclude") for i, data in enumerate(section.data)]
        return [condition for condition in found if condition is not None]

    def _baseline(self) -> None:
        section = self.document.sections.get("baseline", Section({}, {}))
        for name, value in section.data.items():
            place = section.place(name)
            factor = self.reader.factor(str(name), place)
            choice = self.reader.choice((factor,), [value], place) if factor else None
            if choice is not None:
                self.baseline[str(name)] = choice.values[0][1]

    def _check_baseline(self, cells: Any) -> None:
        if self.baseline and not any(
            all(item.factors.get(name) == value for name, value in self.baseline.items()) for item in cells
        ):
            section = self.document.sections["baseline"]
            text = ", ".join(f"{name}: {show_value(value)}" for name, value in self.baseline.items())
            hint = "name values of this grid's factors"
            self.problems.add(f"baseline {{{text}}} matches no cell", section.place(), "baseline", hint)

    def text(self, key: str) -> str:
        """Return a section that is one text."""
        section = self.document.sections.get(key, Section("", {}))
        if isinstance(section.data, str):
            return section.data
        self.problems.add(f"{key} must be text, not {section.data!r}", section.place(), key)
        return ""

    def names(self, key: str) -> list[str]:
        """Return a section that is a list of names."""
        section = self.document.sections.get(key, Section([], {}))
        value = section.data if isinstance(section.data, list) else [section.data]
        if all(isinstance(name, str) and name for name in value):
            return value
        self.problems.add(f"{key} must be a list of names, not {section.data!r}", section.place(), key)
        return []


def _never(_: GridCell) -> bool:
    return False


def _filter(cells: list[GridCell], only: Sequence[str], document: GridDocument, problems: Problems) -> list[GridCell]:
    """Keep the cells that `only` names."""
    wanted: dict[str, tuple[Any, list[Any]]] = {}
    ids = [text for text in only if "=" not in text]
    for text in only:
        name, equals, value = text.partition("=")
        if not equals:
            if not any(item.id.startswith(text) for item in cells):
                problems.add(
                    f"--only {text!r}: no cell has this id", "command line", hint="write FACTOR=VALUE or a cell's id"
                )
            continue
        try:
            factor = find_factor(name.strip(), document.phase, document.plain_seed)
        except Mistake as mistake:
            problems.add(mistake.message, "command line", name, mistake.hint)
            continue
        wanted.setdefault(factor.name, (factor, []))[1].append(value.strip())
    kept = [item for item in cells if not ids or any(item.id.startswith(text) for text in ids)]
    for name, (factor, values) in wanted.items():
        shown = {show_value(item.factors[name] if name in item.factors else factor.read(item.cell)) for item in kept}
        for value in values:
            if value not in shown:
                hint = did_you_mean(value, sorted(shown), "values")
                problems.add(f"--only {name}={value} matches no cell", "command line", name, hint)
        kept = [
            item
            for item in kept
            if show_value(item.factors[name] if name in item.factors else factor.read(item.cell)) in values
        ]
    return kept
