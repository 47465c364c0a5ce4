"""The axes of a grid's products: factor names, their typed values, and the places they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.document import GridDocument, Section
from orchestrator.spec.factors import Assignments, Factor, find_factor
from orchestrator.spec.problems import Mistake, Problems, brief
from orchestrator.spec.units import Length


@dataclass(eq=False, frozen=True, slots=True)
class Choice:
    """One value of an axis (of a paired axis: one per factor), ready to be set in a cell. Compared by identity."""

    values: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    assignments: Assignments = ()


ABSENT = Choice()


@dataclass(eq=False, frozen=True, slots=True)
class Axis:
    """The choices of one factor, or of several paired ones."""

    factors: tuple[Factor, ...]
    choices: tuple[Choice, ...]
    place: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(factor.name for factor in self.factors)


def plain_value(value: Any) -> Any:
    """Return a typed factor value as JSON types."""
    if isinstance(value, Length):
        return value.text
    return list(value) if isinstance(value, tuple) else value


def show_value(value: Any) -> str:
    """Return a factor value as in a cell's name."""
    return value if isinstance(value, str) else json.dumps(value)


class AxisReader:
    """Reads products; what is wrong goes to `problems`."""

    def __init__(self, document: GridDocument, active_width: int, problems: Problems) -> None:
        self.document = document
        self.active_width = active_width
        self.problems = problems

    def products(self) -> list[list[Axis]]:
        """Return the axes of `factors` and of every product of `also`."""
        sections = self.document.sections
        products = [self.product(sections["factors"])] if "factors" in sections else []
        also = sections.get("also", Section([], {}))
        if not isinstance(also.data, list):
            self.problems.add(f"also must be a list of products, not {brief(also.data)}", also.place(), "also")
            return products
        for i, product in enumerate(also.data):
            if isinstance(product, Mapping) and product:
                places = {path[1:]: place for path, place in also.places.items() if path[:1] == (i,)}
                products.append(self.product(Section(product, places)))
            else:
                self.problems.add(f"also must hold mappings of factors, not {brief(product)}", also.place(i), "also")
        return products

    def product(self, section: Section) -> list[Axis]:
        """Return the axes of one mapping `factor: values`."""
        axes = [axis for key, value in section.data.items() if (axis := self.axis(str(key), value, section))]
        seen: dict[Any, tuple[str, str]] = {}
        for axis in axes:
            for factor in axis.factors:
                for path in factor.paths:
                    if path in seen:
                        name = seen[path][0]
                        same = f"factor {name!r} is in two axes"
                        both = f"factors {name!r} and {factor.name!r} both set {'.'.join(path)}"
                        hint = "write shared experts into the granularity: 2/8 with one is 1/7+1"
                        hint = hint if "granularity" in (name, factor.name) else "keep one of them"
                        self.problems.add(same if name == factor.name else both, axis.place, factor.name, hint)
                        break
                    seen[path] = (factor.name, axis.place)
        return axes

    def factor(self, name: str, place: str) -> Factor | None:
        """Return the factor called `name`, or None and a problem."""
        try:
            return find_factor(name, self.document.phase, self.document.plain_seed)
        except Mistake as mistake:
            self.problems.add(mistake.message, place, name, mistake.hint)
            return None

    def axis(self, key: str, values: Any, section: Section) -> Axis | None:
        """Return one axis, or None when it has a problem."""
        place = section.place(key)
        names = [name.strip() for name in key.strip("[] ").split(",")]
        factors = [self.factor(name, place) for name in names]
        values = values if isinstance(values, list) else [values]
        if not values:
            self.problems.add(f"factor {key!r} has no values", place, key, "give at least one value, or remove it")
        if not values or None in factors:
            return None
        known = tuple(factor for factor in factors if factor is not None)
        choices: dict[Any, Choice] = {}
        for i, value in enumerate(values):
            where = section.place(key, i)
            row = value if len(known) > 1 else [value]
            if not isinstance(row, list) or len(row) != len(known):
                hint = f"write [{', '.join(names)}]: [[...], [...]] with {len(known)} values in each"
                self.problems.add(
                    f"paired axis {key!r} needs {len(known)} values, not {brief(value)}", where, key, hint
                )
                continue
            choice = self.choice(known, row, where)
            if choice is None:
                continue
            if choice.assignments in choices:
                self.problems.add(
                    f"factor {key!r} has the value {show_value(value)} twice", where, key, "remove one of them"
                )
            choices[choice.assignments] = choice
        return Axis(known, tuple(choices.values()), place) if choices else None

    def choice(self, factors: tuple[Factor, ...], row: list[Any], place: str) -> Choice | None:
        """Return the choice that sets `factors` to the values in `row`, or None and problems."""
        assigned: list[Any] = []
        values: list[tuple[str, Any]] = []
        sound = True
        for factor, value in zip(factors, row, strict=True):
            try:
                result = factor.assign(value, self.active_width)
            except Mistake as mistake:
                starts = mistake.message.startswith(("granularity", "freeze schedule"))
                message = mistake.message if starts else f"factor {factor.name!r}: {mistake.message}"
                self.problems.add(message, place, factor.name, mistake.hint)
                sound = False
                continue
            assigned.extend(result)
            values.append((factor.name, value if len(result) > 1 else plain_value(result[0][1])))
        if not sound:
            return None
        label = " ".join(f"{name}={show_value(value)}" for name, value in values)
        return Choice(tuple(values), label, tuple(assigned))


@dataclass(frozen=True, slots=True)
class Condition:
    """A conjunction: every factor has one of its values."""

    terms: tuple[tuple[Factor, tuple[Any, ...]], ...]
    place: str
    text: str


def read_condition(
    reader: AxisReader, data: Any, section: Section, path: tuple[Any, ...], key: str
) -> Condition | None:
    """Return the condition written at `path` of `section` (`{freeze: [none, router]}`), or None and problems."""
    place = section.place(*path)
    if not isinstance(data, Mapping) or not data:
        reader.problems.add(f"{key} needs a mapping of factors to values, not {brief(data)}", place, key)
        return None
    terms = []
    for name, value in data.items():
        where = section.place(*path, name)
        factor = reader.factor(str(name), where)
        if factor is None:
            continue
        choices = [reader.choice((factor,), [item], where) for item in (value if isinstance(value, list) else [value])]
        terms.append((factor, tuple(choice.values[0][1] for choice in choices if choice)))
    text = ", ".join(f"{name}: {value}" for name, value in data.items())
    return Condition(tuple(terms), place, text)
