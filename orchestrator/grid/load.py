"""A grid: the cells of one YAML file at one scale, checked as a whole before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.files.problems import Problems
from orchestrator.grid.adaptive import Adaptive
from orchestrator.grid.document import GridDocument, Loader, Section
from orchestrator.grid.expand import GridCell
from orchestrator.grid.files import COMMAND_LINE, find_grid
from orchestrator.grid.merge import merge
from orchestrator.grid.only import select
from orchestrator.grid.reading import Reading
from orchestrator.grid.search import SearchSpec
from orchestrator.spec.identity import digest

__all__ = ["Grid", "GridCell", "load_grid"]


UNHASHED = ("path", "cells", "reserve", "adaptive", "ranks")  # or hashed in another way


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a grid at one scale.

    `factors` are the names of its axes in order, `seed` is the field of `Seeds` that plain `seed` means, `runnable`
    is "" or the reason why this scale cannot run on the local machine. A trial of `search` is the grid loaded again
    with overrides (`search=null`, `factors.router_lr=[3e-5]`). `reserve` are the further seeds that `adaptive` may add,
    in the order in which they are added. `ranks` say which cells (by id) go first, lowest number first.
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
    search: SearchSpec | None = None
    adaptive: Adaptive | None = None
    reserve: tuple[GridCell, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies this version of the grid: its settings, its cells, and what their ids leave out."""
        cells = {item.id: item.name for item in self.cells}
        unhashed = {id(part): part for item in self.cells for part in (item.cell.evaluate, item.cell.execution)}
        settings = [getattr(self, one.name) for one in fields(self) if one.name not in UNHASHED]
        if self.adaptive is not None:
            settings.append(self.adaptive)
        return digest([settings, cells, sorted(map(digest, unhashed.values()))])


def load_grid(
    name_or_path: str,
    *,
    scale: str = "tiny",
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
) -> Grid:
    """Return the grid in a file, or in grids/ by name, at `scale`.

    `overrides` are command-line settings (`factors.seed=[0,1]`, `set.finetune.lr=1e-4`, `at=[1.0]`). `only` keeps
    the cells with a factor's value (`freeze=none->router`; several values of one factor: any of them) or an id.
    `seeds` replaces the values of plain `seed`; an adaptive number of seeds is then switched off.
    Raises GridError with everything that is wrong.
    """
    problems = Problems()
    path = find_grid(name_or_path)
    document = Loader(problems).load(path, scale, overrides)
    if seeds is not None:
        _set_seeds(document, list(seeds))
        document.sections.pop("adaptive", None)
    merged = merge(document, problems)
    reading = Reading(document, merged, path.parent, problems)
    cells = reading.cells()
    reserve = reading.reserve(cells)
    ranks = reading.ranks([*cells, *reserve]) if not problems else {}
    if not problems:
        everything, cells = cells, select(cells, only, document.phase, document.plain_seed, problems)
        if reserve and only:
            # A setting of which some seeds were left out on purpose gets no others instead.
            whole, kept = (Counter(item.setting for item in items) for items in (everything, cells))
            reserve = [item for item in reserve if kept[item.setting] == whole[item.setting]]
    problems.raise_if_any()
    axes = [name for product in reading.products for axis in product for name in axis.names]
    present = {name for item in cells for name in item.factors}
    return Grid(
        path=document.path,
        cells=tuple(cells),
        reserve=tuple(reserve),
        ranks=ranks,
        name=document.name,
        description=reading.description,
        scale=scale,
        recipe=document.base,
        factors=tuple(name for name in dict.fromkeys(axes) if name in present),
        seed=document.plain_seed,
        baseline=reading.baseline,
        primary=reading.primary,
        runnable=reading.runnable,
        search=reading.search,
        adaptive=reading.adaptive,
    )


def _set_seeds(document: GridDocument, seeds: list[int]) -> None:
    """Give every product the seeds of the command line."""
    document.narrowed = True
    factors = document.sections.setdefault("factors", Section({}, {}))
    factors.data["seed"] = seeds
    factors.places[("seed",)] = COMMAND_LINE
    also = document.sections.get("also", Section([], {}))
    for i, product in enumerate(also.data if isinstance(also.data, list) else []):
        if isinstance(product, dict):
            product["seed"] = seeds
            also.places[(i, "seed")] = COMMAND_LINE
