"""Sources of data, by the scheme of `data.source`: how each is pinned where a grid is read, and read on a node.

Another package's source has two or three functions. `pin(source, revision, folder) -> (source, digest)` runs when a
grid is read, without torch: it returns the address as every machine can open it (a relative path is meant from
`folder`) and what changes with the content, a hash or a revision; ValueError says what is wrong with it. On a node
`rows(data)` yields the rows of a DataSpec's split as mappings, whose fields `text_field` or `prompt_field` and
`response_field` name, and `items(data, task)` returns the items of one evaluation task by split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One scheme and the dotted paths of its functions; "" where it has no such data. Ours are read by the project."""

    name: str
    pin: str
    rows: str = ""
    items: str = ""
    version: int = 1


BUILTINS: Mapping[str, SourceKind] = MappingProxyType(
    {
        **{name: SourceKind(name, "orchestrator.data.pinning:pin_package") for name in ("wheel", "npm", "deb")},
        **{name: SourceKind(name, f"orchestrator.data.pinning:pin_{name}") for name in ("hub", "file")},
    }
)
SOURCES = Registry("sources", "source", SourceKind, BUILTINS)


def scheme_of(source: str) -> str:
    """Return the scheme of a source, "" when it has none."""
    return source.partition("://")[0] if "://" in source else ""


def outside_kind(source: str) -> SourceKind | None:
    """Return the kind of a source that another package reads; None for ours and for what nobody provides."""
    scheme = scheme_of(source)
    return SOURCES.find(scheme) if scheme and scheme not in SOURCES.builtins else None
