"""The section of a grid's report with the papers' printed tables."""

from __future__ import annotations

from html import escape

from orchestrator.report.collect import Results
from orchestrator.report.papers.declared import declared
from orchestrator.report.papers.forms import as_html, table


def published_values(results: Results) -> str:
    """Return the papers' tables of this grid: ours in their form, the printed values, and their errata."""
    parts = []
    for exhibit in declared().exhibits:
        made = table(results, exhibit) if exhibit.grid == results.name and exhibit.kind == "table" else None
        if not made:
            continue
        notes = "".join(f"<li>{escape(note)}</li>" for note in made.lacks)
        errata = "".join(f"<li>{escape(note)}</li>" for note in exhibit.errata)
        parts.append(
            f"<details><summary>{escape(f'{exhibit.paper}, {exhibit.name}: {exhibit.shows}')}</summary>"
            f"{''.join(map(as_html, made.tables))}<ul class='notes'>{notes}</ul>"
            f"<ul class='notes errata'>{errata}</ul></details>"
        )
    told = "A printed value stands beside ours only where the same was measured in the same way."
    return f"<p>{told}</p>{''.join(parts)}" if parts else ""
