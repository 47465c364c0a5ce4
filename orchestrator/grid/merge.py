"""The layers of a grid document merged and its `${...}` references resolved: once per grid, by OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from orchestrator.files.problems import Problems
from orchestrator.grid.document import SAID, GridDocument, Section, deep

_RESOLVER = re.compile(r"\$\{[^}]*:")


@dataclass(slots=True)
class Merged:
    """The cell's fields as nested plain data, the other sections, and where each was written last."""

    fields: dict[str, Any]
    sections: dict[str, Section]
    places: dict[tuple[str, ...], str]
    ranks: dict[tuple[str, ...], int]  # of the last layer that wrote a field
    said: frozenset[tuple[str, ...]]  # fields that the grid itself sets, not its recipe or scale

    def place(self, path: tuple[str, ...]) -> str:
        """Return where the field at `path`, or its nearest ancestor, was written last: a mapping, by what is in it."""
        for stop in range(len(path), 0, -1):
            inside = [written for written in self.places if written[:stop] == path[:stop]]
            if inside:
                own = self.ranks.get(path[:stop], -1)
                later = [written for written in inside if self.ranks[written] > own]
                return self.places[later[-1] if later else path[:stop]]
        return ""


def merge(document: GridDocument, problems: Problems) -> Merged:
    """Merge the document's layers; a later one wins, null removes a training phase."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    places: dict[tuple[str, ...], str] = {}
    ranks: dict[tuple[str, ...], int] = {}
    for rank, layer in enumerate(document.layers):
        places.update(layer.places)
        ranks.update(dict.fromkeys(layer.places, rank))
    said = frozenset(path for layer in document.layers if not layer.default for path in layer.places)
    _said_twice(document, problems)
    sections = {key: section.data for key, section in document.sections.items()}
    refuse = list(_calls([layer.data for layer in document.layers])) + list(_calls(sections))
    for text in refuse:
        problems.add(
            f"{text!r} calls a resolver", document.path, hint="only references to fields (${finetune.lr}) are allowed"
        )
    if refuse:
        return Merged({}, document.sections, places, ranks, said)
    try:
        fields: dict[str, object] = reduce(deep, (layer.data for layer in document.layers), {})
        refers = _refers(sections)
        plain = OmegaConf.to_container(OmegaConf.create({**fields, "grid": sections if refers else {}}), resolve=True)
        assert isinstance(plain, dict)
        resolved = plain.pop("grid")
        for key, section in document.sections.items() if refers else ():
            section.data = resolved[key]
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        path = tuple(key.split("."))
        where = next((places[path[:stop]] for stop in range(len(path), 0, -1) if path[:stop] in places), document.path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.add(f"cannot resolve {key}: {reason}", where, key, "a reference is ${section.field} of a cell")
        return Merged({}, document.sections, places, ranks, said)
    return Merged({str(key): value for key, value in plain.items()}, document.sections, places, ranks, said)


def _strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for value in data.values():
            yield from _strings(value)
    elif isinstance(data, list):
        for value in data:
            yield from _strings(value)


def _said_twice(document: GridDocument, problems: Problems) -> None:
    """Report fields that `set` gives a value though a section says it, which wins without a word.

    A section of a later document, scale or word of the command line replaces what was set before it, as it should.
    """
    for key, name in SAID.items():
        if (section := document.sections.get(key)) is None:
            continue
        for layer in document.layers[section.over :]:
            given, path = layer.data.get("evaluate"), ("evaluate", name)
            if not layer.default and isinstance(given, dict) and name in given:
                place = layer.places.get(path) or layer.places.get(path[:1], "")
                said = section.place()
                if place != said:
                    message = f"set.evaluate.{name} changes nothing: {key} says it ({said})"
                    problems.add(message, place, ".".join(path), f"write it as {key}: [...], or {key}=[...]")


def _calls(data: object) -> Iterator[str]:
    return (text for text in _strings(data) if _RESOLVER.search(text))


def _refers(data: object) -> bool:
    return any("${" in text for text in _strings(data))
