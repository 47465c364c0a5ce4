"""Which tables and figures of the three papers this store has results for, and which grid is missing for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.report import formats, html, published, tables
from orchestrator.report.collect import Results, collect
from orchestrator.store import Store
from orchestrator.tracking.records import grid_names


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One table or figure of a paper, and the grid whose report shows it ("" = out of scope here)."""

    paper: str
    name: str
    shows: str
    grid: str


FIGURES = (
    Exhibit("MoE-Bench", "Figures 2, 3, 5, 9", "comparisons within its grids", "finetune_freeze"),
    Exhibit("MoE-Bench", "Figure 4", "freeze schedules", "finetune_freeze"),
    Exhibit("MoE-Bench", "Figure 6", "how the metrics go together", "pretrain_architecture"),
    Exhibit("MoE-Bench", "Figure 7", "collaboration by freeze schedule", "finetune_freeze"),
    Exhibit("MoE-Bench", "Figure 8", "router learning rate against load balance", "finetune_router_lr"),
    Exhibit("LibMoE", "Figures 2-12", "routing of the MoE algorithms over training", "libmoe_algorithms"),
    Exhibit("LibMoE", "Figures 15-17", "router initialisation and balance", "libmoe_router_init"),
    Exhibit("LibMoE", "Table 9", "time and devices per run", "libmoe_algorithms"),
    Exhibit("MoE-RBench", "Figure 3", "routing distance between in-domain and shifted data", "robustness"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What became of one exhibit: the report that shows it, or why there is none."""

    exhibit: Exhibit
    path: str
    reason: str


def exhibits() -> tuple[Exhibit, ...]:
    """Return the papers' tables and figures, tables first."""
    found = [Exhibit(p.paper, p.table, p.title, p.grid) for p in published.published()]
    return (*found, *FIGURES)


def write(store: Store, folder: Path) -> list[Shown]:
    """Write one report per grid that the store has results for, and `index.md`; return what became of every exhibit."""
    known = set(grid_names(store))
    reports: dict[str, str] = {}
    empty: set[str] = set()
    reasons: dict[str, str] = {"": "out of scope here: vision-language models"}
    for grid in dict.fromkeys(exhibit.grid for exhibit in exhibits() if exhibit.grid):
        if grid not in known:
            reasons[grid] = f"the grid {grid} was never run in this store"
            continue
        results = collect(grid, store)
        if not results.metrics:
            reasons[grid] = f"the grid {grid} has no results yet"
            continue
        reports[grid] = str(html.write(results, folder / grid / "index.html").relative_to(folder))
        empty |= {p.table for p in published.published() if p.grid == grid and not published.covered(results, p)}
        (folder / grid / "published.md").write_text(_beside(results), encoding="utf-8")
    shown = [_shown(exhibit, reports, reasons, empty) for exhibit in exhibits()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(overview(shown), encoding="utf-8")
    return shown


def _shown(exhibit: Exhibit, reports: dict[str, str], reasons: dict[str, str], empty: set[str]) -> Shown:
    if exhibit.grid not in reports:
        return Shown(exhibit, "", reasons[exhibit.grid])
    if exhibit.name in empty:
        return Shown(exhibit, "", f"the grid {exhibit.grid} was not evaluated for these columns")
    return Shown(exhibit, reports[exhibit.grid], "")


def overview(shown: Sequence[Shown]) -> str:
    """Return the list of exhibits as Markdown."""
    header = ["paper", "table or figure", "shows", "here"]
    rows = []
    for item in shown:
        here = f"[{item.exhibit.grid}]({item.path})" if item.path else f"missing: {item.reason}"
        rows.append([item.exhibit.paper, item.exhibit.name, item.exhibit.shows, here])
    return formats.markdown_lines(header, rows)


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
