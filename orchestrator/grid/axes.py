"""The axes of a grid's products: factor names, their typed values, and the places they were written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake, Problems, brief
from orchestrator.files.yaml_positions import parse_yaml
from orchestrator.grid.document import GridDocument, Section
from orchestrator.grid.factors import Assignments, Factor, companion, find_factor
from orchestrator.spec.fields import Path
from orchestrator.spec.units import Length


@dataclass(eq=False, frozen=True, slots=True)
class Choice:
    """One value of an axis (of a paired axis: one per factor), ready to be set in a cell. Compared by identity.

    `places` are those of the fields that the section `with` sets together with it.
    """

    values: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    assignments: Assignments = ()
    places: Mapping[Path, str] = field(default_factory=dict)


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

    @property
    def paths(self) -> frozenset[Path]:
        """The fields that its choices set, companions included."""
        own = {path for factor in self.factors for path in factor.paths}
        return frozenset(own | {path for _, path in self.companions()})

    def companions(self) -> Iterator[tuple[str, Path]]:
        """Yield (`factor.value`, field) of what the section `with` sets together with its values."""
        own = {path for factor in self.factors for path in factor.paths}
        for choice in self.choices:
            for path in {path for path, _ in choice.assignments} - own:
                yield ".".join(show_value(part) for part in choice.values[0]), path


def names_of(key: str) -> list[str]:
    """Return the names of an axis as it is written: one, or several that are paired."""
    return [name.strip() for name in key.strip("[] ").split(",")]


def plain_value(value: object) -> Any:
    """Return a typed factor value as JSON types."""
    if isinstance(value, Length):
        return value.text
    return list(value) if isinstance(value, tuple) else value


def show_value(value: object) -> str:
    """Return a factor value as in a cell's name."""
    return value if isinstance(value, str) else json.dumps(value)


def written(factor: Factor, text: str) -> str:
    """Return a value that is written on the command line or as a key as names show it: 1e-4 is 0.0001."""
    value = parse_yaml(text, "", Problems()).data
    if not factor.paths:
        return show_value(value) if isinstance(value, int | float) else text
    try:
        assigned = factor.assign(value, 0)
    except Mistake:
        return text
    return show_value(plain_value(assigned[0][1])) if len(assigned) == 1 else text


class AxisReader:
    """Reads products; what is wrong goes to `problems`.

    `companions` are the fields that the section `with` sets together with a factor's value, by (factor, shown value).
    `named` are the axes that are no fields: their values are the settings that `with` writes under their names.
    """

    def __init__(self, document: GridDocument, active_width: int, problems: Problems) -> None:
        self.document = document
        self.active_width = active_width
        self.problems = problems
        self.companions: dict[tuple[str, str], tuple[Assignments, dict[Path, str]]] = {}
        self.named = self._named_settings()
        self._read_companions()

    def _named_settings(self) -> dict[str, list[str]]:
        """Return the names under `with` that are axes and no fields, each with its values."""
        sections = self.document.sections
        also = sections.get("also", Section([], {})).data
        products = [sections.get("factors", Section({}, {})).data, *(also if isinstance(also, list) else [])]
        axes = {name for one in products if isinstance(one, Mapping) for key in one for name in names_of(str(key))}
        found = {}
        for name, by_value in sections.get("with", Section({}, {})).data.items():
            if name in axes and isinstance(by_value, Mapping) and not self._is_field(str(name)):
                found[str(name)] = [written(Factor(str(name), ()), str(value)) for value in by_value]
        return found

    def _is_field(self, name: str) -> bool:
        try:
            find_factor(name, self.document.phase, self.document.plain_seed)
        except Mistake:
            return False
        return True

    def _read_companions(self) -> None:
        section = self.document.sections.get("with", Section({}, {}))
        for name, by_value in section.data.items():
            factor = self.factor(str(name), section.place(name))
            if not isinstance(by_value, Mapping):
                message = f"with.{name} needs a mapping of values to factors, not {brief(by_value)}"
                self.problems.add(message, section.place(name), f"with.{name}")
                continue
            for value, others in by_value.items():
                place = section.place(name, value)
                if not isinstance(others, Mapping):
                    message = f"with.{name}.{value} needs a mapping of factors to values, not {brief(others)}"
                    self.problems.add(message, place, f"with.{name}.{value}")
                elif factor is not None:
                    found = [
                        (self._companion(str(other), section.place(name, value, other)), other) for other in others
                    ]
                    factors = [other for other, _ in found if other is not None]
                    row = [others[other] for known, other in found if known is not None]
                    choice = self.choice(tuple(factors), row, place)
                    if choice is not None:
                        places = {
                            path: section.place(name, value, other)
                            for known, other in found
                            for path in (known.paths if known is not None else ())
                        }
                        self.companions[str(name), written(factor, str(value))] = choice.assignments, places

    def check_companions(self, products: list[list[Axis]]) -> None:
        """Report what `with` says about a value that no axis has."""
        section = self.document.sections.get("with", Section({}, {}))
        values = {
            (name, show_value(value))
            for product in products
            for axis in product
            for choice in axis.choices
            for name, value in choice.values
        }
        for name, value in self.companions.keys() - values:
            if name in self.named:  # what it offers need not all be chosen
                continue
            message = f"with names {name}: {value}, which is no value of an axis of this grid"
            self.problems.add(message, section.place(name), f"with.{name}", "remove it or correct the value")

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
        seen: dict[object, tuple[str, str]] = {}
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
        for axis in axes:
            for name, path in axis.companions():
                if path in seen:
                    message = f"factor {seen[path][0]!r} and with.{name} both set {'.'.join(path)}"
                    self.problems.add(message, axis.place, f"with.{name}", "keep one of them")
        return axes

    def factor(self, name: str, place: str) -> Factor | None:
        """Return the factor called `name`, or None and a problem."""
        return Factor(name, ()) if name in self.named else self._found(find_factor, name, place)

    def _found(self, find: Callable[[str, str, str], Factor], name: str, place: str) -> Factor | None:
        try:
            return find(name, self.document.phase, self.document.plain_seed)
        except Mistake as mistake:
            self.problems.add(mistake.message, place, name, mistake.hint)
            return None

    def _companion(self, name: str, place: str) -> Factor | None:
        """Return what the section `with` may set, or None and a problem."""
        return self._found(companion, name, place)

    def axis(self, key: str, values: object, section: Section) -> Axis | None:
        """Return one axis, or None when it has a problem."""
        place = section.place(key)
        names = names_of(key)
        factors = [self.factor(name, place) for name in names]
        values = values if isinstance(values, list) else [values]
        if not values:
            self.problems.add(f"factor {key!r} has no values", place, key, "give at least one value, or remove it")
        if not values or None in factors:
            return None
        known = tuple(factor for factor in factors if factor is not None)
        choices: dict[object, Choice] = {}
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
            # Named settings may say the same: that is told of their cells.
            mark = choice.assignments, tuple(part for part in choice.values if part[0] in self.named)
            if mark in choices:
                self.problems.add(
                    f"factor {key!r} has the value {show_value(value)} twice", where, key, "remove one of them"
                )
            choices[mark] = choice
        return Axis(known, tuple(choices.values()), place) if choices else None

    def choice(self, factors: tuple[Factor, ...], row: list[Any], place: str) -> Choice | None:
        """Return the choice that sets `factors` to the values in `row`, or None and problems."""
        assigned: list[Any] = []
        values: list[tuple[str, Any]] = []
        places: dict[Path, str] = {}
        sound = True
        for factor, value in zip(factors, row, strict=True):
            try:
                result = factor.assign(value, self.active_width)
            except Mistake as mistake:
                message = mistake.message if mistake.named else f"factor {factor.name!r}: {mistake.message}"
                self.problems.add(message, place, factor.name, mistake.hint)
                sound = False
                continue
            if (offered := self.named.get(factor.name)) and show_value(value) not in offered:
                message = f"factor {factor.name!r}: {show_value(value)!r} is none of {', '.join(offered)}"
                self.problems.add(message, place, factor.name, did_you_mean(show_value(value), offered, "values"))
                sound = False
                continue
            assigned.extend(result)
            values.append((factor.name, plain_value(result[0][1]) if len(result) == 1 else value))
            others, their_places = self.companions.get((factor.name, show_value(values[-1][1])), ((), {}))
            assigned.extend(others)
            places |= their_places
        if not sound:
            return None
        label = " ".join(f"{name}={show_value(value)}" for name, value in values)
        return Choice(tuple(values), label, tuple(assigned), places)


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
