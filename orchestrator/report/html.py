"""The report of a grid: one self-contained HTML page (offline, light and dark, readable on a phone), CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path

from orchestrator.catalog.suites import with_arrays
from orchestrator.report import answer, facts, formats, result_tables, sections, svg, tables
from orchestrator.report.collect import DONE, RUNNING, Results
from orchestrator.report.papers.beside import published_values
from orchestrator.report.script import HASH, SCRIPT


def _routing(results: Results) -> str:
    """Return the routing figures; NumPy is loaded only where a grid was probed."""
    if not any(with_arrays(stage.get("suite", "")) for stage in results.document["stages"].values()):
        return ""
    from orchestrator.report.routing import routing_maps

    return routing_maps(results)


def _effects(results: Results) -> str:
    """Return the effects of several factors on the primary metrics."""
    if len(results.factors) < 2:
        return ""
    from orchestrator.report import effects

    metrics = [metric for metric in results.primary if metric in results.metrics] or results.metrics[:1]
    shown = effects.table([results], metrics)
    return "" if shown is None else sections.table(shown)


def _scaling(results: Results) -> str:
    """Return the fits over the sizes of a grid."""
    if len({cell.get("flops_per_token") for cell in results.document["cells"]}) < 2:
        return ""
    from orchestrator.report.scaling import scaling_fits

    return scaling_fits(results)


SECTIONS: tuple[tuple[str, str, Callable[[Results], str]], ...] = (
    ("results", "Results", result_tables.results_table),
    ("differences", "Differences to the baseline", sections.difference_plots),
    ("problems", "Failed or missing", facts.problems),
    ("progress", "Metrics over the run", sections.progress_curves),
    ("training", "Training curves", sections.training_curves),
    ("factors", "Pairs of factors", sections.factor_maps),
    ("responses", "Response to a factor", sections.responses),
    ("effects", "Effects of the factors", _effects),
    ("scaling", "Loss against size", _scaling),
    ("fronts", "Quality, cost and balance", sections.pareto),
    ("correlations", "How the metrics go together", sections.correlations),
    ("loads", "Expert loads", sections.expert_loads),
    ("routing", "Routing", _routing),
    ("published", "Published values", published_values),
    ("provenance", "Provenance", facts.provenance),
    ("definitions", "What the columns mean", result_tables.definitions),
)
RELOAD_SECONDS = 60
LIVE_SECONDS = 10
# The page may load nothing, and run nothing but its own script, whatever a name in a grid tries.
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{HASH}'"
STYLE = (
    f":root{{color-scheme:light dark;{svg.LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{svg.DARK}}}}}\n"
    """*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1rem;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1,h3,p,li,summary{overflow-wrap:break-word}h1{margin:.2em 0;font-size:1.7rem}h2{margin:2em 0 .5em;font-size:1.25rem}
h3{margin:1em 0 .2em;font-size:1rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:.3rem .9rem;padding:.5rem 0;border-bottom:1px solid var(--line)}
.scroll,.figure{overflow-x:auto;-webkit-overflow-scrolling:touch}.figure{margin:.8rem 0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;white-space:nowrap;color:var(--quiet);padding-bottom:.4rem}
th,td{padding:.32rem .65rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{border-bottom:2px solid var(--line);background:var(--page)}th[scope=row]{text-align:left;font-weight:500}
thead th.label{text-align:left}tr>:first-child{position:sticky;left:0;background:var(--page);z-index:1}
thead th.group{text-align:left;border-bottom:1px solid var(--line);color:var(--quiet);font-weight:500}
thead th.group span{position:sticky;left:9rem;display:inline-block}
table.sortable thead th[data-c]{cursor:pointer}th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}th .unit{color:var(--quiet);font-weight:400}
table.main td,table.main thead th{white-space:normal;min-width:5.2rem}table.main th[scope=row]{white-space:normal;
min-width:7rem;max-width:15rem;overflow-wrap:anywhere;border-right:1px solid var(--line)}
table.main .pm{color:var(--quiet);font-size:.92em;white-space:nowrap}.whole{white-space:nowrap}
.answer{font-size:1.05rem;border-left:4px solid var(--accent);padding:.1rem 0 .1rem 1rem;margin:1rem 0;max-width:60rem}
.answer p{margin:.5rem 0}.answer ul{margin:.2rem 0 .6rem;padding-left:1.2rem}code{overflow-wrap:anywhere;font-size:.9em}
.tip{position:fixed;z-index:9;max-width:min(26rem,92vw);padding:.35rem .6rem;background:var(--text);color:var(--page);
font-size:.8rem;white-space:pre-line;border-radius:4px;pointer-events:none}.tip[hidden]{display:none}
.tools{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.82rem;color:var(--quiet);align-items:center}
.tools input[type=range]{width:7rem;vertical-align:middle}.hint{color:var(--accent);font-size:.82rem;margin:.1rem 0}
.small-multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:.5rem;align-items:end}
.small-multiples svg{min-width:0}.paper{display:none}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(560px,100%),1fr));gap:0 1rem}
.maps{display:flex;flex-wrap:wrap;gap:0 2rem}.maps>div,.pair>div{min-width:0;max-width:100%}
tbody tr:hover{background:var(--panel)}.quiet,.mark{color:var(--quiet)}.ours{color:var(--accent)}
.notes{color:var(--quiet);font-size:.85rem;padding-left:1.2rem}.errata li{color:var(--warm)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem}dd{margin:0;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--panel);padding:.8rem;font-size:.8rem}summary{cursor:pointer}
svg{display:block;width:100%;min-width:560px;max-width:860px;height:auto}
@media print{nav,.tools,.screen,.tip{display:none!important}.paper{display:block}
body{max-width:none;padding:0;font-size:11pt}.scroll,.figure{overflow:visible}
svg{min-width:0!important;max-width:100%}table{font-size:8pt;max-width:100%}
td,th,caption{white-space:normal!important;overflow-wrap:anywhere;padding:.15rem .3rem}
.pair{grid-template-columns:1fr}svg,tr{break-inside:avoid-page}
h2,h3,summary{break-after:avoid-page}pre{white-space:pre-wrap}
tr>:first-child{position:static}table.main th[scope=row]{max-width:none}}
@media (max-width:600px){.answer{font-size:.92rem;line-height:1.4;margin:.6rem 0}.answer p{margin:.3rem 0}
dl{grid-template-columns:1fr}
th,td{padding:.3rem .45rem}caption{white-space:normal}}
""" + svg.RULES
)


Parts = list[tuple[str, str, str]]  # name, title and HTML of each section that has something to show


def parts_of(results: Results) -> Parts:
    """Return the sections of the report; everything that comes from a grid is escaped."""
    return [(name, title, text) for name, title, make in SECTIONS if (text := make(results))]


def page(results: Results, parts: Parts | None = None, command: str = "", *, live: bool = False) -> str:
    """Return the whole report as one HTML page; while cells are running it loads itself again every minute.

    `command` is the one that makes the results again, "" for the grid's own at its scale. A `live` page, which a server
    makes anew, loads itself again as long as any cell is missing.
    """
    document = results.document
    shown = parts_of(results) if parts is None else parts
    states = Counter(cell.state for cell in results.cells)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{text}</section>' for name, title, text in shown)
    running = any(cell.state == RUNNING for cell in results.cells)
    missing = any(cell.state != DONE for cell in results.cells)
    seconds = LIVE_SECONDS if live and missing else RELOAD_SECONDS if running else 0
    return shell(
        f"{results.name} ({document['scale']})",
        f"<h1>{escape(results.name)}</h1><p>{escape(document.get('description', ''))}</p>"
        f"{answer.answer(results, command)}"
        f"<p class='quiet'>Cells: {escape(counts)}.</p>"
        f"<nav>{links}</nav><main>{body}</main>",
        reload=seconds,
    )


def shell(title: str, body: str, *, reload: int = 0) -> str:
    """Return a whole page around `body`, which is HTML; `reload` seconds later it loads itself again (0: never)."""
    again = f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'{again}<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}<script>{SCRIPT}</script></body></html>\n"
    )


def write(results: Results, path: Path, command: str = "") -> Path:
    """Write the page to `path`, and beside it tables (CSV, LaTeX, Markdown) and `figures/SECTION/*.svg`; return `path`.

    Each file appears whole or not at all, so that a browser may reload the page while the grid runs.
    """
    main, parts = tables.headline(results), parts_of(results)
    primary = [metric for metric in results.primary if metric in results.metrics]
    compared = tables.differences(results, primary)
    files = {
        path.name: page(results, parts, command),
        "table.csv": formats.as_csv(main),
        "table.tex": formats.latex(main),
        "table.md": formats.markdown(main),
        "differences.csv": formats.as_csv(compared),
        "differences.tex": formats.latex(compared),
        "cells.csv": formats.render_rows(tables.long_rows(results), "csv"),
    }
    for section, _, text in parts:
        files |= {f"figures/{section}/{name}.svg": figure for name, figure in svg.figures(text).items()}
    for old in (path.parent / "figures").rglob("*.svg"):
        if str(old.relative_to(path.parent)) not in files:
            old.unlink()
    for name, text in files.items():
        target = path.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    return path
