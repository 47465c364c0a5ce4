"""The headline table of the page: columns by group, written out, sortable; on paper in pieces that fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from orchestrator.report.collect import Results
from orchestrator.report.differences import direction
from orchestrator.report.facts import COSTS, cost_rows
from orchestrator.report.tables import MISSING, Entry, Table, headline
from orchestrator.report.words import column_head, grouped, named, written

PAPER_COLUMNS = 5  # of a piece of the table on an A4 page
# Columns of the page's table that are no metrics, and which costs they are.
COST_COLUMNS = {"cost/active": "active", "cost/flops": "FLOPs a token", "cost/hours": "hours of training"}


def results_table(results: Results) -> str:
    """Return the headline table; bold is best beyond doubt, the reason of an empty cell is its tooltip."""
    shown = _with_costs(results, headline(results))
    groups = grouped(shown.columns)
    ordered = [metric for _, members in groups for metric in members]
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    screen = f'<div class="scroll screen">{_table(shown, groups, "main sortable")}</div>'
    pieces = "".join(
        _table(shown, grouped(ordered[start : start + PAPER_COLUMNS]), "main")
        for start in range(0, len(ordered), PAPER_COLUMNS)
    )
    title = f"<p class='quiet'>{escape(shown.title)}</p>"
    return f"{title}{screen}<div class='paper'>{pieces}</div><ul class='notes'>{notes}</ul>"


def definitions(results: Results) -> str:
    """Return what every column means, its unit, and which way is better."""
    rows = []
    for metric in _with_costs(results, headline(results)).columns:
        words = written(metric)
        better = {-1: "lower is better", 1: "higher is better", 0: ""}[direction(metric)]
        told = "; ".join(filter(None, (words.meaning, words.unit and f"in {words.unit}", better)))
        name = f"{escape(words.name)} <code>{escape(metric)}</code>"
        rows.append(f'<dt id="def-{escape(metric)}">{name}</dt><dd>{escape(told)}</dd>')
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _whole(name: str) -> str:
    """Return a setting's name, escaped, whose schedules (`none->router`) are not broken at their arrows."""
    return re.sub(r"[^\s,]{1,24}-&gt;[^\s,]{1,24}", lambda found: f'<span class="whole">{found[0]}</span>', name)


def _table(shown: Table, groups: Sequence[tuple[str, Sequence[str]]], classes: str) -> str:
    """Return the table with these columns; a row is named by its factors, together in its first cell."""
    columns = [metric for _, members in groups for metric in members]
    at = {metric: i for i, metric in enumerate(shown.columns)}
    over = "".join(
        f'<th class="group" colspan="{len(members)}"><span>{escape(group)}</span></th>' for group, members in groups
    )
    head = "".join(column_head(metric, f' data-c="{i}"') for i, metric in enumerate(columns, 1))
    names = ", ".join(shown.labels[:-1]) or "setting"
    body = []
    for labels, entries in shown.rows:
        name = named(dict(zip(shown.labels[:-1], labels, strict=False)))
        seeds = f' <span class="quiet">({labels[-1]} seed{"s" * (labels[-1] != "1")})</span>'
        cells = "".join(_cell(entries[at[metric]]) for metric in columns)
        body.append(f'<tr><th scope="row">{_whole(escape(name))}{seeds}</th>{cells}</tr>')
    return (
        f'<table class="{classes}"><thead><tr><th class="label"></th>{over}</tr>'
        f'<tr><th scope="col" class="label" data-c="0">{escape(names)}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _with_costs(results: Results, shown: Table) -> Table:
    """Return the table with what one run of each setting costs, where that is known."""
    costs = {row[0]: dict(zip(COSTS, row, strict=True)) for row in cost_rows(results)}
    if not costs:
        return shown
    rows = []
    for setting, (labels, entries) in zip(results.settings, shown.rows, strict=True):
        own = costs.get(setting.name, {})
        texts = [own.get(name, "").partition(" ")[0] for name in COST_COLUMNS.values()]
        rows.append((labels, (*entries, *(Entry(text, float(text)) if text else Entry(MISSING) for text in texts))))
    return replace(shown, columns=(*shown.columns, *COST_COLUMNS), rows=tuple(rows))


def _cell(entry: Entry) -> str:
    mean, _, rest = entry.text.partition(" ")
    text = f"{escape(mean)} <span class='pm'>{escape(rest)}</span>" if rest else escape(mean)
    text = f"<strong>{text}</strong>" if entry.bold else text
    mark = f' <span class="mark">{escape(entry.mark)}</span>' if entry.mark else ""
    title = f' title="{escape(entry.reason)}"' if entry.reason else ""
    quiet = ' class="quiet"' if entry.mark else ""
    value = "" if entry.value is None else f"{entry.value:.9g}"
    return f'<td{quiet}{title} data-v="{value}">{text}{mark}</td>'
