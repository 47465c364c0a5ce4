"""Which run of a grid makes an exhibit: the newest one, else an earlier one that has what the newest has not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from orchestrator.report.collect import Results, collect
from orchestrator.report.papers.declared import Exhibit
from orchestrator.report.papers.forms import Made
from orchestrator.store import Store
from orchestrator.store.records import documents, grid_names

Maker = Callable[[Results, Exhibit], Made]


class Versions:
    """The results of every version of the grids in a store, each read once and when it is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.known = frozenset(grid_names(store)) if store.exists else frozenset[str]()
        self._found: dict[str, list[Results | None]] = {}
        self._documents: dict[str, list[dict[str, object]]] = {}

    def of(self, grid: str) -> Iterator[Results]:
        """Yield the results of a grid's versions that have any, the newest first."""
        if grid not in self.known:
            return
        if grid not in self._documents:
            self._documents[grid] = documents(self._store, grid)[::-1]
            self._found[grid] = []
        found = self._found[grid]
        for number, document in enumerate(self._documents[grid]):
            if number == len(found):
                results = collect(document, self._store)
                found.append(results if results.metrics else None)
            held = found[number]
            if held is not None:
                yield held

    def newest(self, grid: str) -> Results | None:
        """Return the results of the newest version that has any, None where none has."""
        return next(self.of(grid), None)

    def make(self, exhibit: Exhibit, maker: Maker | None) -> tuple[Made, Results | None]:
        """Return the exhibit as the newest version makes it that lacks nothing of it, and whose results these are.

        Where all lack something the newest that makes it at all does. A version all of whose results another one has as
        well, with more, is not asked. Scales never stand in for each other: that which was planned last comes first.
        """
        if maker is None:
            return Made(), None
        by_scale: dict[object, list[Results]] = {}
        for results in self.of(exhibit.grid):
            by_scale.setdefault(results.document["scale"], []).append(results)
        for versions in by_scale.values():
            best: tuple[Made, Results | None] = (Made(), None)
            for one in _widest(versions):
                made = maker(one, exhibit)
                if made and not made.lacks:
                    return made, one
                if made and not best[0]:
                    best = made, one
            if best[0]:
                return best
        return Made(), None


def _widest(versions: Sequence[Results]) -> list[Results]:
    """Return the versions but those all of whose results another one has, and more."""
    held = [results.manifests.keys() for results in versions]
    return [one for one, own in zip(versions, held, strict=True) if not any(own < more for more in held)]
