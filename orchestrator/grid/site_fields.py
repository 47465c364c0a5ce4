"""A site's settings by the types of a dataclass's fields. Of the words of a shell or a scheduler none may be guessed.

Text is what was written: `account: 012345` keeps its zero and `python/3.10` its last digit. An empty value asks for
nothing, `false` leaves out, and a list stands for its items joined by commas.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake, Problems, brief
from orchestrator.files.yaml_positions import Document, Path
from orchestrator.spec.fields import typed

Settings = TypeVar("Settings")
VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
OPTION = re.compile(r"^[A-Za-z][A-Za-z0-9-]*$")
_SPOKEN = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def asked(values: Mapping[str, object]) -> dict[str, Any]:
    """Return what a mapping of options asks for, as text or True: what is empty or false is left out."""
    found = {}
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value if item is not None and item is not False)
        if value is not None and value is not False and value != "":
            found[name] = True if value is True else str(value)
    return found


def variables(values: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that a mapping exports: those whose value is null or false are left out."""
    found = {name: "true" if value is True else value for name, value in asked(values).items()}
    return {name: found.get(name, "") for name, value in values.items() if name in found or value == ""}


class SettingsReader:
    """Reads documents; what is wrong in them goes to `problems`, with the place and the nearest name."""

    def __init__(self, document: Document, problems: Problems, lists: str) -> None:
        """`lists` says where all settings are listed and explained."""
        self.document = document
        self.problems = problems
        self.lists = lists

    def read(self, owner: type[Settings], others: frozenset[str] = frozenset()) -> Settings | None:
        """Return an `owner` made of the document's data, of which `others` are somebody else's; None when it cannot be.

        An empty value means the default.
        """
        hints = typing.get_type_hints(owner)
        own = {item.name: item for item in fields(owner)}  # type: ignore[arg-type]
        required = {f.name for f in own.values() if f.default is MISSING and f.default_factory is MISSING}
        before = len(self.problems.found)
        known = [*hints, *sorted(others)]
        values: dict[str, object] = {}
        for key, value in self.document.data.items():
            if key not in known:
                near = did_you_mean(key, known)
                hint = near if near.startswith("did you mean") else self.lists
                self._add((key,), f"setting {key!r} is unknown", hint)
            elif key in hints and value is not None:
                try:
                    values[key] = self._value(hints[key], (key,), value)
                    least = own[key].metadata.get("least")
                    if least is not None and values[key] < least:
                        raise Mistake(f"must be at least {least}, not {brief(value)}")
                    self._leave_alone(key, values[key], own[key].metadata.get("own", frozenset()))
                except Mistake as mistake:
                    self._add((key,), f"{key} {mistake.message}", mistake.hint)
        for key in sorted(required - values.keys()):
            if self.document.data.get(key) is None:
                self._add((), f"{key} is missing", self.lists)
        return owner(**values) if len(self.problems.found) == before else None

    def _value(self, hint: object, path: Path, value: object) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is str:
            return self._text(path, value)
        if origin is tuple:
            items = value if isinstance(value, list | tuple) else [value]
            texts = [
                self._text((*path, i) if items is value else path, item, lines=True) for i, item in enumerate(items)
            ]
            return tuple(text for text in texts if text)
        if hint is bool and isinstance(value, str) and value.lower() in _SPOKEN:
            raise Mistake(f"must be true or false, not {brief(value)}", f"write {_SPOKEN[value.lower()]}")
        if isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise Mistake(f"must be a mapping, not {brief(value)}", "write {NAME: value}")
            return self._mapping(arguments[1], path, value)
        return typed(hint, value)

    def _mapping(self, hint: object, path: Path, values: Mapping[str, object]) -> dict[str, Any]:
        """Options (any), variables (text) or amounts (numbers) by name."""
        found: dict[str, object] = {}
        for name, value in values.items():
            where = (*path, name)
            try:
                if hint is str and not VARIABLE.match(str(name)):
                    raise Mistake("is not the name of a variable", "use letters, digits and _")
                if value is None or value is False:
                    continue
                if hint is float:
                    found[name] = typed(hint, value)
                elif hint is Any and value is True:
                    found[name] = True
                elif (text := self._text(where, value, lines=hint is str, true=hint is str)) or value == "":
                    found[name] = text
            except Mistake as mistake:
                self._add(where, f"{'.'.join(map(str, where))} {mistake.message}", mistake.hint)
        return found

    def _leave_alone(self, key: str, options: Any, reserved: frozenset[str]) -> None:
        for name in options if reserved else ():
            plain = str(name).lstrip("-").replace("_", "-")
            if not OPTION.match(plain):
                self._add((key, name), f"{key}.{name} is not the name of an option", "write it as in --name")
            elif plain in reserved:
                self._add((key, name), f"{key}.{name} is set by moegrid itself", "remove it")

    def _text(self, path: Path, value: object, *, lines: bool = False, true: bool = False) -> str:
        """Return a value as it was written; a list's items joined by commas. `true` may be a word."""
        if value is None or value is False:
            return ""
        if isinstance(value, list | tuple):
            if any(isinstance(item, Mapping | list | tuple) for item in value):
                raise Mistake(f"must be text or a list of texts, not {brief(value)}")
            return ",".join(filter(None, (self._text((*path, i), item, lines=lines) for i, item in enumerate(value))))
        if isinstance(value, Mapping) or (value is True and not true):
            raise Mistake(f"must be text, not {brief(value)}", "quote the word" if value is True else "")
        text = self.document.written.get(path, "true" if value is True else str(value))
        if not lines and not text.isprintable():
            raise Mistake(f"must be one line of text, not {brief(text)}")
        return text

    def _add(self, path: Path, message: str, hint: str) -> None:
        self.problems.add(message, self.document.place(path), ".".join(map(str, path)), hint)


def settings_of(owner: type[Settings], data: Mapping[str, object], lists: str, others: frozenset[str]) -> Settings:
    """Return an `owner` made of plain data. Raises GridError with everything that is wrong in them."""
    problems = Problems()
    made = SettingsReader(Document(dict(data)), problems, lists).read(owner, others)
    problems.raise_if_any()
    assert made is not None
    return made
