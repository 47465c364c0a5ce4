"""Keys and values that were renamed: an old name is understood, and told, for one release; then it is unknown.

A field's path as it was, and its last word now: `("finetune", "rate"): "lr"`. Under `set:` the whole path is meant,
where factors are named its last word as well. Of values a field's path, and what each old one is called now.
CHANGELOG.md says when a row came and when it goes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.catalog.backbones import FORMERLY
from orchestrator.files.yaml_positions import Document, Path

RENAMED: Mapping[tuple[str, ...], str] = {}
VALUES: Mapping[tuple[str, ...], Mapping[str, str]] = {
    ("model", "backbone"): {old: new for new, old in FORMERLY.items()},
}
# Sections whose keys are names of factors.
_OF_FACTORS = ("factors", "also", "baseline", "when", "with", "exclude", "priority")
_TOLD = "%s is called %s now (%s): the old name goes with the next release"
log = logging.getLogger(__name__)


def renew(document: Document) -> None:
    """Give what has an old name in a document its new one, and tell where."""
    if RENAMED:
        for at, old, new in list(_found(document.data, ())):
            where = document.place((*at, old))
            log.warning(_TOLD, old, new, where)
            _rename(document, at, old, new)
    for at, key, words, index in list(_valued(document.data, ())):
        data = _inside(document.data, at)
        if _section(at) == ("with",) and isinstance(data[key], dict):  # values of a factor are its keys
            for old in set(words) & set(data[key]):
                log.warning(_TOLD, old, words[old], document.place((*at, key, old)))
                _rename(document, (*at, key), old, words[old])
        else:
            data[key] = _new_value(data[key], words, index, document.place((*at, key)))


def renewed_value(key: str, value: object, where: str) -> object:
    """Return the value of a setting of the command line by its new name."""
    section, _, rest = key.partition(".")
    for words, index in _values_of((section,), rest):
        if section == "with" and isinstance(value, dict):  # values of a factor are its keys
            value = {_new_value(name, words, None, where): told for name, told in value.items()}
        else:
            value = _new_value(value, words, index, where)
    above = (section, rest)
    for at, name, words, index in list(_valued(value, above)) if isinstance(value, dict) else ():
        data = _inside(value, at[len(above) :])
        data[name] = _new_value(data[name], words, index, where)
    return value


def renewed(key: str) -> str:
    """Return the key of a setting of the command line, `factors.rate` or `set.finetune.rate`, by its new name."""
    section, _, rest = key.partition(".")
    return f"{section}.{_new_name((section,), rest)}" if rest and RENAMED else key


def _found(data: object, at: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield (path of the mapping, old key, new key), the innermost first."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _found(value, (*at, key))
        if isinstance(key, str) and (new := _new_name(at, key)) != key:
            yield at, key, new


def _valued(data: object, at: Path) -> Iterator[tuple[Path, str, Mapping[str, str], int | None]]:
    """Yield (path of the mapping, key, old values, place in the key's list of names) of fields with renamed values."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _valued(value, (*at, key))
        if isinstance(key, str):
            yield from ((at, key, words, index) for words, index in _values_of(at, key))


def _values_of(at: Path, key: str) -> Iterator[tuple[Mapping[str, str], int | None]]:
    """Yield the old values of the fields that a key names, and the place of each where it names several."""
    section = _section(at)
    for path, words in VALUES.items():
        if section == ("set",):
            inside = at[at.index("set") + 1 :]
            if _split((*inside, key)) == path:
                yield words, None
        elif _split((*at, key)) == path or (section == ("search",) and at[-1] in (path[-1], ".".join(path))):
            # Of a recipe, or the list of a distribution.
            yield words, None
        elif section and section[0] in _OF_FACTORS:
            names = [name.strip() for name in key.strip("[] ").split(",")]
            for index, name in enumerate(names):
                if name in (path[-1], ".".join(path)):
                    yield words, index if len(names) > 1 else None


def _split(names: Path) -> tuple[str, ...]:
    return tuple(part for name in names for part in str(name).split("."))


def _new_value(value: object, words: Mapping[str, str], index: int | None, where: str) -> object:
    """Return a value, those of a list, or the `index`-th of each of its rows, by their new names."""
    if isinstance(value, str) and value in words:
        log.warning(_TOLD, value, words[value], where)
        return words[value]
    if not isinstance(value, list):
        return value
    rows = any(isinstance(row, list) for row in value)
    taken = range(len(value)) if index is None or rows else (index,)
    within = index if rows else None
    return [_new_value(row, words, within, where) if at in taken else row for at, row in enumerate(value)]


def _section(at: Path) -> Path:
    """Return the section of a grid that a path lies in; what a scale says is of the same ones."""
    return (at[2:] if at[:1] == ("scales",) else at)[:1]


def _inside(data: Any, at: Path) -> Any:
    for part in at:
        data = data[part]
    return data


def _new_name(at: Path, key: str) -> str:
    inside = at[2:] if at[:1] == ("scales",) else at
    if inside[:1] == ("set",):
        above = tuple(part for name in inside[1:] for part in str(name).split("."))
        return ".".join(_renewed_path((*above, *key.split(".")))[len(above) :])
    if inside[:1] and inside[0] in _OF_FACTORS:
        words = {old[-1]: new for old, new in RENAMED.items()}
        names = [name.strip() for name in key.strip("[] ").split(",")]
        fresh = [words.get(name) or ".".join(_renewed_path(tuple(name.split(".")))) for name in names]
        return key if fresh == names else fresh[0] if len(fresh) == 1 else f"[{', '.join(fresh)}]"
    return key


def _renewed_path(path: tuple[str, ...]) -> tuple[str, ...]:
    for old, new in RENAMED.items():
        if path[: len(old)] == old:
            return (*old[:-1], new, *path[len(old) :])
    return path


def _rename(document: Document, at: Path, old: str, new: str) -> None:
    """Rename a key in the data and in all places, in its order."""
    data = _inside(document.data, at)
    items = [(new if key == old else key, value) for key, value in data.items()]
    data.clear()
    data.update(items)
    places = document.places
    for path in [path for path in places if path[: len(at) + 1] == (*at, old)]:
        places[(*at, new, *path[len(at) + 1 :])] = places.pop(path)
