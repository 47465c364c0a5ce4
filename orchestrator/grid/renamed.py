"""Keys that were renamed: an old name is understood, and told, for one release; then it is unknown as any other.

A field's path as it was, and its last word now: `("finetune", "rate"): "lr"`. Under `set:` the whole path is meant,
where factors are named its last word as well. CHANGELOG.md says when a row came and when it goes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.files.yaml_positions import Document, Path

RENAMED: Mapping[tuple[str, ...], str] = {}
# Sections whose keys are names of factors.
_OF_FACTORS = ("factors", "also", "baseline", "when", "with", "exclude", "priority")
log = logging.getLogger(__name__)


def renew(document: Document) -> None:
    """Give what has an old name in a document its new one, and tell where."""
    if RENAMED:
        for at, old, new in list(_found(document.data, ())):
            where = document.place((*at, old))
            log.warning("%s is called %s now (%s): the old name goes with the next release", old, new, where)
            _rename(document, at, old, new)


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
    data: Any = document.data
    for part in at:
        data = data[part]
    items = [(new if key == old else key, value) for key, value in data.items()]
    data.clear()
    data.update(items)
    places = document.places
    for path in [path for path in places if path[: len(at) + 1] == (*at, old)]:
        places[(*at, new, *path[len(at) + 1 :])] = places.pop(path)
