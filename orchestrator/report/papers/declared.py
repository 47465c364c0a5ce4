"""What the papers show: every table and figure as declared in `grids/reference/exhibits.yaml`, with printed values."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator import resources
from orchestrator.errors import MoegridError
from orchestrator.files.problems import Problems
from orchestrator.files.yaml_positions import read_mapping

FOLDER = resources.project("grids/reference")
FILE = "exhibits.yaml"
Entry = Mapping[str, Any]  # of the file, or of a cell's document
# Columns of the printed tables that say what a row is.
LABELS = (
    "setting",
    "backbone",
    "granularity",
    "shared_expert",
    "router",
    "regularisation",
    "scale",
    "method",
    "task",
    "data",
    "temperature",
)
UNITS = ("percent", "share", "bits", "nats", "score", "perplexity")
STANDING = ("=FOLDER", "=FILE")  # ends of words that stand for data of the user
RENAMED = {"type": "kind", "number": "name"}  # the file's words -> fields


@dataclass(frozen=True, slots=True)
class Column:
    """How a printed column was measured: the metric here, or the mean of the tasks beside it; shots; unit.

    `differs` says why a metric of ours is another one than the printed, `items` how many that one is the mean of.
    """

    name: str
    metric: str = ""
    mean: str = ""
    shots: int | None = None
    unit: str = "share"
    differs: str = ""
    items: int = 0


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One table or figure: what it shows, the grid that makes it ("" = none does), and how it is drawn (`kind`).

    `lacks` says why no grid makes it; `needs` names data that its grid has only from the user, `words` what the grid
    is told for it alone. `size` is the published model's parameters in millions, for all rows or by the rows' `scale`;
    where the paper prints none, `scale` names the scale that carries its setting. `data` are the sets that rows of a
    `data` were trained on. `components` are the parts of a vision side that it is about. `also` is what another grid
    makes of it, with the fields that are others there. All other fields are read by the maker of its kind.
    """

    paper: str
    name: str
    shows: str
    grid: str
    kind: str
    lacks: str = ""
    needs: str = ""
    words: str = ""
    vision: bool = False
    printed: str = ""
    protocol: str = ""
    backbone: str = ""
    scale: str = ""
    size: Mapping[str, float] = field(default_factory=dict)
    dense_size: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    by: str = ""
    x: str = ""
    panels: str = ""
    lines: str | Mapping[str, tuple[str, ...]] = ""
    split: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    series: str = ""
    probe: str = ""
    layer_metric: str = ""
    sets: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    also: Entry = field(default_factory=dict)
    mark: str = ""
    normalised: bool = False
    first_steps: int = 0
    columns: tuple[Column, ...] = ()
    labels: tuple[str, ...] = ()
    rows: tuple[Mapping[str, str], ...] = ()
    errata: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its name in file names: `moe-bench_table_3`."""
        return f"{self.paper}_{self.name}".lower().replace(" ", "_")

    @property
    def variants(self) -> tuple[Exhibit, ...]:
        """Itself, and what another grid makes of it."""
        return (self, replace(self, **{**self.also, "also": {}})) if self.also else (self,)


@dataclass(frozen=True, slots=True)
class Declared:
    """All exhibits, tables before figures of each paper, and the words that a grid is run with for them."""

    exhibits: tuple[Exhibit, ...]
    runs: Mapping[str, str]

    def words(self, grid: str) -> list[str]:
        """Return the words that a grid is run with beside its name, without those that stand for a user's own data."""
        return [word for word in self.runs.get(grid, "").split() if not word.endswith(STANDING)]

    def command(self, exhibit: Exhibit, scale: str = "") -> str:
        """Return the command whose results make an exhibit; FOLDER and FILE stand for data that only the user has."""
        words = self.runs.get(exhibit.grid, "").split() if exhibit.needs else self.words(exhibit.grid)
        at = ["--scale", scale] if scale else []
        return " ".join(["moegrid run", exhibit.grid, *words, *exhibit.words.split(), *at])


@lru_cache(maxsize=1)
def declared() -> Declared:
    """Return what `exhibits.yaml` declares; MoegridError names an entry that cannot be."""
    problems = Problems()
    document: Entry = read_mapping(FOLDER / FILE, FILE, problems).data
    problems.raise_if_any()
    protocols = {
        name: tuple(Column(column, **dict(how)) for column, how in columns.items())
        for name, columns in document["protocols"].items()
    }
    errata = _errata()
    exhibits = tuple(_exhibit(entry, protocols, errata) for entry in document["exhibits"])
    return Declared(exhibits, dict(document["runs"]))


def _exhibit(
    entry: Entry, protocols: Mapping[str, tuple[Column, ...]], errata: Mapping[str, tuple[str, ...]]
) -> Exhibit:
    values = {RENAMED.get(name, name): value for name, value in entry.items()}
    told = f"{values.get('paper')} {values.get('name')}"
    unknown = values.keys() - set(Exhibit.__dataclass_fields__)
    if unknown:
        raise MoegridError(f"{FILE}: {told}: unknown keys {', '.join(sorted(unknown))}")
    for name in ("size", "dense_size"):
        if name in values:
            sizes = values[name] if isinstance(values[name], Mapping) else {"": values[name]}
            values[name] = {scale: float(millions) for scale, millions in sizes.items()}
    for name in ("metrics", "at", "sets", "components"):
        values[name] = tuple(values.get(name, ()))
    if "also" in values:
        values["also"] = {name: tuple(v) if isinstance(v, list) else v for name, v in values["also"].items()}
    values["settings"] = {name: tuple(pair) for name, pair in values.get("settings", {}).items()}
    values["where"] = _chosen(values.get("where", {}))
    if isinstance(values.get("lines"), Mapping):
        values["lines"] = _chosen(values["lines"])
    columns = protocols.get(values.get("protocol", ""), ())
    if values.get("printed"):
        rows = tuple(_rows(FOLDER / f"{values['printed']}.csv"))
        names = tuple(rows[0])
        known = {column.name: column for column in columns}
        values["rows"], values["labels"] = rows, tuple(name for name in names if name in LABELS)
        columns = tuple(known.get(name, Column(name)) for name in names if name not in LABELS)
        values["errata"] = errata.get(values["printed"], ())
    return Exhibit(columns=columns, **values)


def _chosen(values: Entry) -> dict[str, tuple[str, ...]]:
    """Return factor -> its values as tables show them."""
    return {
        name: tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
        for name, value in values.items()
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _errata() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    section = ""
    for line in (FOLDER / "ERRATA.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].strip()
        elif line.startswith("- ") and section:
            found.setdefault(section, []).append(line[2:].strip())
    return {name: tuple(lines) for name, lines in found.items()}
