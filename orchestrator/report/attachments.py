"""What a tracker shows beside the numbers: the report in a run of its own, curves and loads in the run of each cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from orchestrator.report import answer, formats, loads, plots, sections, svg, tables
from orchestrator.report.collect import CellResult, Results
from orchestrator.store.records import Row
from orchestrator.tracking.publish import NOTE_FILE

FORMS = ("csv", "tex", "md")
MOST_NOTE = 7500  # characters that MLflow keeps of a tag: 8,000
CURVES = ("train/loss", "routing/load_balance")


def write(results: Results, report: Path, folder: Path) -> Path:
    """Write the files of each run below `folder` (`report/...`, `cell/ID/...`); return it. `report` is index.html."""
    tables = [path for form in FORMS for path in report.parent.glob(f"*.{form}")]
    for path in [report, *tables, *(report.parent / "figures").rglob("*.svg")]:
        _put(folder / "report" / path.relative_to(report.parent), path.read_bytes())
    _put(folder / "report" / NOTE_FILE, note(results).encode())
    rows = results.series(results.cells)
    for cell in results.cells:
        for name, figure in cell_figures(results, cell, rows.get(cell.id, ())).items():
            _put(folder / "cell" / cell.id / "figures" / f"{name}.svg", figure.encode())
    return folder


def note(results: Results) -> str:
    """Return what the report says first, and the primary columns of its table, as Markdown a tracker's page holds."""
    told = f"# {results.name}\n\n{answer.as_markdown(results)}"
    metrics = [metric for metric in results.primary if metric in results.metrics] or list(results.metrics[:1])
    table = formats.markdown(tables.headline(results, metrics))
    whole = f"{told}\n{table}\nThe page with all of it: `index.html` among the artifacts of this run.\n"
    return whole if len(whole) <= MOST_NOTE else told[:MOST_NOTE]


def cell_figures(results: Results, cell: CellResult, rows: Sequence[Row]) -> dict[str, str]:
    """Return name -> SVG of what is known of one cell; `rows` is the series of its last phase."""
    markers = sections.phase_changes(results, cell.document)
    parts = []
    for metric in CURVES:
        points = [(int(r["step"]), float(r[metric])) for r in rows if isinstance(r.get(metric), (int, float))]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        parts.append(plots.curves([plots.Line(cell.name, steps, values, values, values)], metric, markers))
    counts = loads.counts_of(results, cell.document)
    if counts:
        parts.append(loads.load_map(counts))
    return svg.figures("".join(parts))


def _put(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
