"""The report of a grid: one self-contained HTML page (offline, light and dark, readable on a phone), CSV and LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path

from orchestrator.report import facts, formats, sections, tables
from orchestrator.report.collect import Results


def _routing(results: Results) -> str:
    """Return the routing figures; NumPy is loaded only where a grid was probed."""
    if not any(stage.get("suite") == "probe" for stage in results.document["stages"].values()):
        return ""
    from orchestrator.report.routing import routing_maps

    return routing_maps(results)


SECTIONS: tuple[tuple[str, str, Callable[[Results], str]], ...] = (
    ("results", "Results", sections.results_table),
    ("differences", "Differences to the baseline", sections.difference_plots),
    ("problems", "Failed or missing", facts.problems),
    ("progress", "Metrics over the run", sections.progress_curves),
    ("training", "Training curves", sections.training_curves),
    ("factors", "Pairs of factors", sections.factor_maps),
    ("fronts", "Quality, cost and balance", sections.pareto),
    ("correlations", "How the metrics go together", sections.correlations),
    ("loads", "Expert loads", sections.expert_loads),
    ("routing", "Routing", _routing),
    ("published", "Published values", sections.published_values),
    ("provenance", "Provenance", facts.provenance),
)
# The page may load nothing and run nothing, whatever a name in a grid tries.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root{color-scheme:light dark;--text:#1c2330;--quiet:#667085;--page:#fff;--panel:#f6f7f9;--line:#d8dde5;
--accent:#0b63ce;--warm:#d1495b;--cold:#2a78c2;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b58900;--c5:#56a3d9;--c6:#7a4fbf;
--c7:#8c564b;--c8:#3f7f1f;--c9:#e0447c;--c10:#5f6b7a;--c11:#00a0a0}
@media (prefers-color-scheme:dark){:root{--text:#e6e9ef;--quiet:#98a2b3;--page:#14171c;--panel:#1d2127;--line:#363c46;
--accent:#7db4ff;--warm:#ff7a8a;--cold:#6fb4f2;--c0:#4db1ec;--c1:#ff8a3d;--c2:#2fd0a0;--c3:#eaa2cc;--c4:#e3c14a;
--c5:#9ad0f5;--c6:#b79bf0;--c7:#cf9c8f;--c8:#8fce6a;--c9:#ff86ad;--c10:#aab4c2;--c11:#45d3d3}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1rem;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{margin:.2em 0;font-size:1.7rem;overflow-wrap:anywhere}h2{margin:2em 0 .5em;font-size:1.25rem}
h3{margin:1em 0 .2em;font-size:1rem}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:.3rem .9rem;padding:.5rem 0;border-bottom:1px solid var(--line)}
.scroll,.figure{overflow-x:auto;-webkit-overflow-scrolling:touch}.figure{margin:.8rem 0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .65rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{border-bottom:2px solid var(--line);background:var(--page)}th[scope=row]{text-align:left;font-weight:500}
thead th.label{text-align:left}tr>:first-child{position:sticky;left:0;background:var(--page)}
.maps{display:flex;flex-wrap:wrap;gap:0 2rem}
tbody tr:hover{background:var(--panel)}.quiet,.mark{color:var(--quiet)}.ours{color:var(--accent)}
.notes{color:var(--quiet);font-size:.85rem;padding-left:1.2rem}.errata li{color:var(--warm)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem}dd{margin:0;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--panel);padding:.8rem;font-size:.8rem}summary{cursor:pointer}
svg{display:block;width:100%;min-width:560px;max-width:860px;height:auto;font-size:12px}
svg text{fill:var(--text)}svg .value{font-size:11px}svg .small{font-size:11px;fill:var(--quiet)}
.axis{stroke:var(--quiet)}.grid{stroke:var(--line);stroke-width:.6}.zero{stroke:var(--text);stroke-dasharray:3 3}
.marker{stroke:var(--quiet);stroke-dasharray:4 4}.whisker{stroke-width:2}
.curve{fill:none;stroke:currentColor;stroke-width:1.8}
.band{fill:currentColor;opacity:.14}.front{fill:none;stroke:var(--accent);stroke-dasharray:5 4}
.strong .dot{fill:var(--accent)}.strong .whisker{stroke:var(--accent)}
.weak .dot{fill:var(--page);stroke:var(--quiet);stroke-width:2}
.weak .whisker{stroke:var(--quiet)}.square{stroke:var(--line);stroke-width:.5}
@media print{nav{display:none}body{max-width:none}}
"""


def page(results: Results) -> str:
    """Return the whole report as one HTML page; everything that comes from a grid is escaped."""
    document = results.document
    shown = [(name, title, text) for name, title, make in SECTIONS if (text := make(results))]
    states = Counter(cell.state for cell in results.cells)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{text}</section>' for name, title, text in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(results.name)} ({escape(document['scale'])})</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(results.name)}</h1><p>{escape(document.get('description', ''))}</p>"
        f"<p>Scale {escape(document['scale'])}; {len(results.cells)} cells: {escape(counts)}.</p>"
        f"<nav>{links}</nav><main>{body}</main></body></html>\n"
    )


def write(results: Results, path: Path) -> Path:
    """Write the page to `path`, and `table.{csv,tex,md}`, `differences.csv` and `cells.csv` beside it; return `path`.

    Each file appears whole or not at all, so that a browser may reload the page while the grid runs.
    """
    main = tables.headline(results)
    primary = [metric for metric in results.primary if metric in results.metrics]
    files = {
        path.name: page(results),
        "table.csv": formats.as_csv(main),
        "table.tex": formats.latex(main),
        "table.md": formats.markdown(main),
        "differences.csv": formats.as_csv(tables.differences(results, primary)),
        "cells.csv": formats.render_rows(tables.long_rows(results), "csv"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        part = path.with_name(f".{name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path.with_name(name))
    return path
