"""Reading results from Python: what `moegrid table` prints, as rows, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.report.collect import collect
from orchestrator.report.tables import long_rows
from orchestrator.settings import store_url
from orchestrator.store import Store
from orchestrator.store.records import grid_names

Row = dict[str, Any]


class Results:
    """The grids of one store and what came out of them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def url(self) -> str:
        """The URL or absolute path of the store."""
        return self._store.url

    def grids(self) -> list[str]:
        """Return the names of all grids that were ever run in this store."""
        return grid_names(self._store)

    def results(self, grid: str) -> list[Row]:
        """Return one row per setting and seed of a grid's newest version, ready for `pandas.DataFrame`.

        A row has the grid's factors, `seed`, `state` (`done`, `failed`, `blocked`, `running`, `pending`), `reason` (why
        values are missing, else "") and every metric under its name in docs/metrics.md, unrounded, None where missing.
        Raises MoegridError when the store does not know the grid.
        """
        return long_rows(collect(grid, self._store))

    def by_fraction(self, grid: str) -> dict[str, Mapping[float, Mapping[str, float]]]:
        """Return, by cell name, the metrics at each evaluated fraction of the run (`at`: 0 < at <= 1)."""
        return {cell.name: cell.by_at for cell in collect(grid, self._store).cells}


def open_store(url: str | None = None) -> Results:
    """Open a store to read results: a folder or `s3://bucket/prefix`; by default MOEGRID_STORE, else `./runs`.

    Nothing is made or changed. Raises StoreError when there is no store.
    """
    store = Store.peek(store_url(url))
    if not store.exists:
        raise StoreError(f"there is no store at {store.url}", hint="moegrid run GRID makes one")
    return Results(store)
