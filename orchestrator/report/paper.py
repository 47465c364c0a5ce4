"""The tables and figures of the three papers from the results of this store, and what is missing for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from orchestrator.grid.files import grid_names as own_grids
from orchestrator.report import formats, html, svg
from orchestrator.report.collect import DONE, Results
from orchestrator.report.papers import drawn, forms
from orchestrator.report.papers.declared import Declared, Exhibit, declared
from orchestrator.report.papers.forms import Made
from orchestrator.report.papers.versions import Maker, Versions
from orchestrator.store import Store


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


# A note of what an exhibit was made of.
EARLIER = "made of an earlier run of {grid}, which has what its newest has not"

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
    catalogue, versions = declared(), Versions(store)
    shown, parts, pages = [], [], dict[str, Results]()
    for grid in {one.grid: None for exhibit in catalogue.exhibits for one in exhibit.variants}:
        if (newest := versions.newest(grid)) is not None:
            pages[grid] = newest
    if pages:
        folder.mkdir(parents=True, exist_ok=True)
    for exhibit in catalogue.exhibits:
        made: dict[str, Made] = {}
        sources: dict[str, Results] = {}
        notes: list[str] = []
        for one in exhibit.variants:
            own, results = versions.make(one, MAKERS.get(one.kind))
            if results is not None:
                made[one.grid] = own
                page = _page_of(results, pages[one.grid])
                sources[page] = results
                notes += own.lacks
                notes += [EARLIER.format(grid=one.grid)] * (page != one.grid)
        pages |= sources
        if made:
            files: list[str] = []
            for grid, own in made.items():
                files += _write(own, exhibit, folder, "" if grid == exhibit.grid else f"_{grid}")
            shown.append(Shown(exhibit, f"index.html#{exhibit.slug}", "", "", tuple(files), tuple(notes)))
        else:
            shown.append(Shown(exhibit, "", *_missing(catalogue, exhibit, versions)))
        parts.append(_part(shown[-1], made, {page: str(found.document["scale"]) for page, found in sources.items()}))
    for page, results in pages.items():
        html.write(results, folder / page / "index.html")
    if not pages:
        return shown
    (folder / "index.html").write_text(_page(shown, parts), encoding="utf-8")
    (folder / "index.md").write_text(overview(shown), encoding="utf-8")
    return shown


def _page_of(results: Results, newest: Results) -> str:
    """Return the folder of the report of a grid's version: its name, and of an earlier one that of the version."""
    name, digest = str(results.document["name"]), str(results.document["digest"])
    return name if newest.document["digest"] == digest else f"{name}-{digest[:8]}"


def to_run(store: Store) -> list[str]:
    """Return the grids of this project, in the papers' order, whose results exhibits wait for.

    A grid is to run when an exhibit that needs no data of the user's is not made of it, or a cell of it is not done.
    """
    versions, ours = Versions(store), set(own_grids())
    wanted: dict[str, None] = {}
    for exhibit in declared().exhibits:
        for one in exhibit.variants:
            if one.kind == "none" or one.needs or one.grid not in ours:
                continue
            found = versions.newest(one.grid)
            made, _ = versions.make(one, MAKERS.get(one.kind))
            if not made or found is None or any(cell.state != DONE for cell in found.cells):
                wanted.setdefault(one.grid)
    return list(wanted)


def _missing(catalogue: Declared, exhibit: Exhibit, versions: Versions) -> tuple[str, str]:
    """Return why an exhibit is missing, and the command that makes it ("" when none does)."""
    grid, command = exhibit.grid, catalogue.command(exhibit)
    results = versions.newest(grid)
    if exhibit.lacks or not grid:
        return exhibit.lacks, ""
    if grid not in set(own_grids()):
        return f"its {'vision-language ' * exhibit.vision}grid {grid} is not one of this project's", ""
    needs = f"; it needs {exhibit.needs}" if exhibit.needs else ""
    if grid not in versions.known:
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
