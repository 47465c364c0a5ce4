"""The tables and figures of the three papers from the results of this store, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from orchestrator.grid.files import grid_names as own_grids
from orchestrator.report import formats, html, svg
from orchestrator.report.collect import DONE, Results, collect
from orchestrator.report.papers import drawn, forms
from orchestrator.report.papers.declared import Declared, Exhibit, declared
from orchestrator.report.papers.forms import Made
from orchestrator.store import Store
from orchestrator.store.records import grid_names

Maker = Callable[[Results, Exhibit], Made]


@dataclass(frozen=True, slots=True)
class Shown:
    """What became of one exhibit: its own files, or why there is none and the command that makes it."""

    exhibit: Exhibit
    path: str  # of the page that shows it
    reason: str
    command: str
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _from_arrays(name: str) -> Maker:
    def make(results: Results, exhibit: Exhibit) -> Made:
        from orchestrator.report.papers import layers  # brings NumPy

        maker: Maker = getattr(layers, name)
        return maker(results, exhibit)

    return make


MAKERS: Mapping[str, Maker] = {
    "table": forms.table,
    "settings": forms.settings,
    "times": forms.times,
    "components": forms.components,
    "bars": drawn.bars,
    "curves": drawn.curves,
    "response": drawn.response,
    "radar": drawn.radar,
    "stacked": drawn.stacked,
    "parts": drawn.parts,
    **{name: _from_arrays(name) for name in ("layers", "sets", "loads", "coactivation", "shift")},
}


def write(store: Store, folder: Path) -> list[Shown]:
    """Make every exhibit that the store has results for: tables as CSV and LaTeX, figures as SVG, one page of all.

    Returns what became of every exhibit, in the papers' order; where nothing can be made nothing is written.
    """
    catalogue, known = declared(), _known(store)
    results = _results(store, known)
    for name, found in results.items():
        html.write(found, folder / name / "index.html")
    shown, parts = [], []
    for exhibit in catalogue.exhibits:
        made = {one.grid: _made(results, one) for one in exhibit.variants}
        made = {grid: one for grid, one in made.items() if one}
        if made:
            files: list[str] = []
            for grid, one in made.items():
                files += _write(one, exhibit, folder, "" if grid == exhibit.grid else f"_{grid}")
            notes = [note for one in made.values() for note in one.lacks]
            shown.append(Shown(exhibit, f"index.html#{exhibit.slug}", "", "", tuple(files), tuple(notes)))
        else:
            shown.append(Shown(exhibit, "", *_missing(catalogue, exhibit, known, results.get(exhibit.grid))))
        parts.append(_part(shown[-1], made, {grid: str(results[grid].document["scale"]) for grid in made}))
    if not results:
        return shown
    (folder / "index.html").write_text(_page(shown, parts), encoding="utf-8")
    (folder / "index.md").write_text(overview(shown), encoding="utf-8")
    return shown


def _made(results: Mapping[str, Results], exhibit: Exhibit) -> Made:
    own, maker = results.get(exhibit.grid), MAKERS.get(exhibit.kind)
    return maker(own, exhibit) if own is not None and maker is not None else Made()


def to_run(store: Store) -> list[str]:
    """Return the grids of this project, in the papers' order, whose results exhibits wait for.

    A grid is to run when an exhibit that needs no data of the user's is not made of it, or a cell of it is not done.
    """
    known, ours = _known(store), set(own_grids())
    results = _results(store, known)
    wanted: dict[str, None] = {}
    for exhibit in declared().exhibits:
        for one in exhibit.variants:
            if one.kind == "none" or one.needs or one.grid not in ours:
                continue
            found = results.get(one.grid)
            if not _made(results, one) or found is None or any(cell.state != DONE for cell in found.cells):
                wanted.setdefault(one.grid)
    return list(wanted)


def _known(store: Store) -> set[str]:
    return set(grid_names(store)) if store.exists else set()


def _results(store: Store, known: Collection[str]) -> dict[str, Results]:
    """Return the results of the grids that exhibits are made of, as far as there are any."""
    names = dict.fromkeys(one.grid for exhibit in declared().exhibits for one in exhibit.variants)
    return {name: found for name in names if name in known and (found := collect(name, store)).metrics}


def _missing(catalogue: Declared, exhibit: Exhibit, known: set[str], results: Results | None) -> tuple[str, str]:
    """Return why an exhibit is missing, and the command that makes it ("" when none does)."""
    grid, command = exhibit.grid, catalogue.command(exhibit)
    if exhibit.lacks or not grid:
        return exhibit.lacks, ""
    if grid not in set(own_grids()):
        return f"its {'vision-language ' * exhibit.vision}grid {grid} is not one of this project's", ""
    needs = f"; it needs {exhibit.needs}" if exhibit.needs else ""
    if grid not in known:
        return f"the grid {grid} was never run in this store{needs}", command
    if results is None:
        return f"the grid {grid} has no results yet", command
    scale, done = str(results.document["scale"]), sum(cell.state == DONE for cell in results.cells)
    if done < len(results.cells):
        return f"of the grid {grid} {done} of {len(results.cells)} cells are done{needs}", catalogue.command(
            exhibit, scale
        )
    why = f"it needs {exhibit.needs}" if exhibit.needs else "they hold none of its settings and columns"
    return f"the results of {grid} do not make it: {why}", catalogue.command(exhibit, scale)


def _write(made: Made, exhibit: Exhibit, folder: Path, of_grid: str) -> tuple[str, ...]:
    """Write the files of an exhibit and return their names; `of_grid` follows its own where another grid made it."""
    files: dict[str, str] = {}
    slug = exhibit.slug + of_grid
    for lines, suffix in zip(made.tables, ("", ".printed"), strict=False):
        rows = [lines.header, *lines.rows]
        files[f"{slug}{suffix}.csv"] = formats.csv_lines(rows)
        notes = [lines.title, *exhibit.errata, *made.lacks]
        files[f"{slug}{suffix}.tex"] = formats.latex_lines(lines.header, lines.rows, lines.labels, notes)
    for i, figure in enumerate(made.figures, 1):
        drawing = figure[figure.index("<svg ") : figure.index("</svg>") + len("</svg>")]
        files[f"{slug}-{i}.svg"] = svg.standalone(drawing)
    for old in (*folder.glob(f"{slug}-*.svg"), *folder.glob(f"{slug}.*")):
        if old.name not in files:
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tuple(files)


def overview(shown: Sequence[Shown]) -> str:
    """Return the list of exhibits as Markdown."""
    header = ["paper", "table or figure", "shows", "here"]
    rows = []
    for item in shown:
        links = ", ".join(f"[{name}]({name})" for name in item.files)
        here = links or f"missing: {item.reason}" + (f" (`{item.command}`)" if item.command else "")
        rows.append([item.exhibit.paper, item.exhibit.name, item.exhibit.shows, here])
    return formats.markdown_lines(header, rows)


def _page(shown: Sequence[Shown], parts: Sequence[str]) -> str:
    made = sum(bool(item.files) for item in shown)
    papers = dict.fromkeys(item.exhibit.paper for item in shown if item.files)
    links = "".join(
        f"<span>{escape(paper)}:</span>"
        + "".join(
            f'<a href="#{item.exhibit.slug}">{escape(item.exhibit.name)}</a>'
            for item in shown
            if item.files and item.exhibit.paper == paper
        )
        for paper in papers
    )
    opening = (
        f"<p>{made} of {len(shown)} tables and figures of MoE-Bench, LibMoE and MoE-RBench, made from the results of"
        " this store. Printed values stand beside ours only where the same was measured in the same way.</p>"
    )
    return html.shell("The papers' tables and figures", f"{opening}<nav>{links}</nav><main>{''.join(parts)}</main>")


def _part(item: Shown, made: Mapping[str, Made], scales: Mapping[str, str]) -> str:
    exhibit = item.exhibit
    title = f"{exhibit.paper}, {exhibit.name}: {exhibit.shows}"
    if not made:
        command = f" <code>{escape(item.command)}</code>" if item.command else ""
        return f'<p class="quiet" id="{exhibit.slug}">{escape(title)} - missing: {escape(item.reason)}{command}</p>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in item.notes)
    errata = "".join(f"<li>{escape(note)}</li>" for note in exhibit.errata)
    body = "".join(forms.as_html(table) for one in made.values() for table in one.tables)
    drawings = "".join(figure for one in made.values() for figure in one.figures)
    figures = f"<div class='pair'>{drawings}</div>" if drawings else ""
    source = "; ".join(
        f'ours at scale {escape(scale)}: <a href="{escape(grid)}/index.html">report of {escape(grid)}</a>'
        for grid, scale in scales.items()
    )
    return (
        f'<section id="{exhibit.slug}"><h2>{escape(title)}</h2>{figures}{body}'
        f"<ul class='notes'>{notes}<li>{source}</li></ul><ul class='notes errata'>{errata}</ul></section>"
    )
