"""The tables and figures of the three papers from the results of this store, and which grid is missing for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.grid.files import grid_names as own_grids
from orchestrator.report import formats, html, published, tables
from orchestrator.report.collect import Results, collect
from orchestrator.store import Store
from orchestrator.store.records import grid_names


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One table or figure of a paper, and the grid whose report shows it ("" = out of scope here).

    `section` is the part of the report whose figures make it, "" where the report as a whole does.
    """

    paper: str
    name: str
    shows: str
    grid: str
    section: str = ""


MOST_FILES = 4
FIGURES = (
    Exhibit("MoE-Bench", "Figures 2, 3, 5, 9", "comparisons within its grids", "finetune_freeze", "differences"),
    Exhibit("MoE-Bench", "Figure 4", "freeze schedules", "finetune_freeze", "differences"),
    Exhibit("MoE-Bench", "Figure 6", "how the metrics go together", "pretrain_architecture", "correlations"),
    Exhibit("MoE-Bench", "Figure 7", "collaboration by freeze schedule", "finetune_freeze", "differences"),
    Exhibit("MoE-Bench", "Figure 8", "router learning rate against load balance", "finetune_router_lr", "responses"),
    Exhibit("LibMoE", "Figures 2-12", "routing of the MoE algorithms over training", "libmoe_algorithms", "routing"),
    Exhibit("LibMoE", "Figures 15-17", "router initialisation and balance", "libmoe_router_init", "training"),
    Exhibit("LibMoE", "Table 9", "time and devices per run", "libmoe_algorithms"),
    Exhibit("MoE-RBench", "Figure 3", "routing distance of in-domain and shifted data", "rbench_robustness", "routing"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What became of one exhibit: the report that shows it with its own files, or why there is none."""

    exhibit: Exhibit
    path: str
    reason: str
    files: tuple[str, ...] = ()


def exhibits() -> tuple[Exhibit, ...]:
    """Return the papers' tables and figures, tables first."""
    found = [Exhibit(p.paper, p.table, p.title, p.grid) for p in published.published()]
    return (*found, *FIGURES)


def write(store: Store, folder: Path) -> list[Shown]:
    """Write a report per grid that the store has results for, the papers' tables beside ours, and `index.md`.

    Returns what became of every exhibit.
    """
    known, ours = set(grid_names(store)), set(own_grids())
    reports: dict[str, str] = {}
    empty: set[tuple[str, str]] = set()
    reasons: dict[str, str] = {"": "out of scope here: vision-language models"}
    for grid in dict.fromkeys(exhibit.grid for exhibit in exhibits() if exhibit.grid):
        if grid not in known:
            run = f"was never run in this store: moegrid run {grid}"
            reasons[grid] = f"the grid {grid} " + (run if grid in ours else "is not one of this project's")
            continue
        results = collect(grid, store)
        if not results.metrics:
            reasons[grid] = f"the grid {grid} has no results yet"
            continue
        reports[grid] = str(html.write(results, folder / grid / "index.html").relative_to(folder))
        empty |= {
            (p.paper, p.table) for p in published.published() if p.grid == grid and not published.covered(results, p)
        }
        (folder / grid / "published.md").write_text(_beside(results), encoding="utf-8")
        for table in published.published():
            if table.grid == grid and published.covered(results, table):
                _write_table(results, table, folder / grid)
    shown = [_shown(exhibit, reports, reasons, empty, folder) for exhibit in exhibits()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(overview(shown), encoding="utf-8")
    return shown


def _shown(
    exhibit: Exhibit, reports: dict[str, str], reasons: dict[str, str], empty: set[tuple[str, str]], folder: Path
) -> Shown:
    if exhibit.grid not in reports:
        return Shown(exhibit, "", reasons[exhibit.grid])
    if (exhibit.paper, exhibit.name) in empty:
        return Shown(exhibit, "", f"the grid {exhibit.grid} was not evaluated for these columns")
    base = folder / exhibit.grid
    if exhibit.section:
        files = sorted((base / "figures" / exhibit.section).glob("*.svg"))
        if not files:
            reason = f"the grid {exhibit.grid} was not evaluated for this figure (section {exhibit.section})"
            return Shown(exhibit, "", reason)
    else:
        names = {p.table: p.name for p in published.published() if p.paper == exhibit.paper}
        files = sorted(base.glob(f"{names.get(exhibit.name, '-')}.*"))
    return Shown(exhibit, reports[exhibit.grid], "", tuple(str(file.relative_to(folder)) for file in files))


def overview(shown: Sequence[Shown]) -> str:
    """Return the list of exhibits as Markdown."""
    header = ["paper", "table or figure", "shows", "here"]
    rows = []
    for item in shown:
        files = ", ".join(f"[{Path(file).name}]({file})" for file in item.files[:MOST_FILES])
        more = f", {len(item.files) - MOST_FILES} more beside them" if len(item.files) > MOST_FILES else ""
        link = f"[{item.exhibit.grid}]({item.path})" + (f": {files}{more}" if files else "")
        here = link if item.path else f"missing: {item.reason}"
        rows.append([item.exhibit.paper, item.exhibit.name, item.exhibit.shows, here])
    return formats.markdown_lines(header, rows)


def _write_table(results: Results, table: published.Published, folder: Path) -> None:
    """Write one published table with our values beside its own, as CSV and LaTeX."""
    header = [*table.labels, *(name for c in table.columns for name in (c, f"{c} (ours)"))]
    rows = [
        [*(row[n] for n in table.labels)]
        + [text for c in table.columns for text in (row[c], published.ours(results, table, row, c))]
        for row in table.rows
    ]
    (folder / f"{table.name}.csv").write_text(formats.csv_lines([header, *rows]), encoding="utf-8")
    notes = [f"{table.paper}, {table.table}: {table.title}", *table.errata]
    (folder / f"{table.name}.tex").write_text(formats.latex_lines(header, rows, len(table.labels), notes), "utf-8")


def _beside(results: Results) -> str:
    """Return the published tables of a grid with our values beside them, as Markdown."""
    parts = [formats.markdown(tables.headline(results))]
    for shown in published.published():
        if shown.grid != results.name:
            continue
        header = [*shown.labels, *(name for c in shown.columns for name in (c, f"{c} (ours)"))]
        rows = [
            [*(row[n] for n in shown.labels)]
            + [text for c in shown.columns for text in (row[c], published.ours(results, shown, row, c))]
            for row in shown.rows
        ]
        errata = "".join(f"- {note}\n" for note in shown.errata)
        parts.append(f"## {shown.paper}, {shown.table}\n\n{formats.markdown_lines(header, rows)}\n{errata}")
    return "\n".join(parts)
