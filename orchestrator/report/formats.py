"""The forms of a table: terminal, CSV, Markdown, LaTeX, JSON. Every form shows the same numbers."""

from __future__ import annotations

import csv
import io
import json
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from orchestrator.report.tables import MARKS, Entry, Table, number

FORMS = ("terminal", "csv", "md", "tex", "json")


def render(table: Table, form: str, width: int = 0) -> str:
    """Return the table as `terminal`, `csv`, `md`, `tex` or `json` text; a terminal has lines of `width` (0: any)."""
    if form == "terminal":
        return terminal(table, width)
    forms = {"csv": as_csv, "md": markdown, "tex": latex, "json": as_json}
    return forms[form](table)


def render_rows(rows: Sequence[dict[str, Any]], form: str) -> str:
    """Return `long_rows` as `csv`, `md` or `json` text."""
    if form == "json":
        return json.dumps(list(rows), indent=1) + "\n"
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
    return csv_lines([names, *texts]) if form == "csv" else markdown_lines(names, texts)


def terminal(table: Table, width: int = 0) -> str:
    """Return the table as aligned text: `*` best, `?` uninformative, `~` leaky.

    Columns that `width` characters do not hold (0: any number) follow below, each block with the labels again.
    """
    header = [*table.labels, *table.columns]
    body = [[*labels, *(_plain(entry) for entry in entries)] for labels, entries in table.rows]
    left = len(table.labels)
    widths = [max(_width(line[i]) for line in [header, *body]) for i in range(len(header))]
    if width:  # names of settings may be longer than a line
        room = max(12, (width - 2 * left) // 2 // max(left, 1))
        widths[:left] = [min(wide, room) for wide in widths[:left]]

    def line(cells: Sequence[str], columns: Sequence[int]) -> str:
        padded = []
        for i in columns:
            cell = cells[i] if _width(cells[i]) <= widths[i] else f"{cells[i][: widths[i] - 3]}..."
            space = " " * (widths[i] - _width(cell))
            padded.append(cell + space if i < left else space + cell)
        return "  ".join(padded).rstrip()

    blocks = []
    for columns in _blocks(widths, left, width):
        rule = "  ".join("-" * widths[i] for i in columns)
        blocks.append("\n".join([line(header, columns), rule, *(line(cells, columns) for cells in body)]))
    notes = [part for note in table.notes for part in _wrapped(note, width)]
    title = _wrapped(table.title, width, indent="")
    return "\n".join([*title, "\n\n".join(blocks), *notes]) + "\n"


def _blocks(widths: Sequence[int], left: int, width: int) -> list[list[int]]:
    """Return the columns of each block: the labels, and as many others as a line of `width` holds, at least one."""
    blocks = [list(range(left))]
    for i in range(left, len(widths)):
        used = sum(widths[c] + 2 for c in (*blocks[-1], i)) - 2
        if width and used > width and len(blocks[-1]) > left:
            blocks.append(list(range(left)))
        blocks[-1].append(i)
    return blocks


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    if not width:
        return [indent + text]
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent) or [indent]


def as_csv(table: Table) -> str:
    """Return the table as CSV; a metric has the columns `m`, `m_se`, `m_low`, `m_high` and `m_note`."""
    suffixes = ("", "_se", "_low", "_high", "_note")
    header = [*table.labels, *(f"{metric}{suffix}" for metric in table.columns for suffix in suffixes)]
    body = []
    for labels, entries in table.rows:
        line = list(labels)
        for entry in entries:
            line += [number(entry.value), number(entry.stderr), number(entry.low), number(entry.high)]
            line.append("; ".join(filter(None, (MARKS.get(entry.mark, ""), "best" * entry.bold, entry.reason))))
        body.append(line)
    return csv_lines([header, *body])


def markdown(table: Table) -> str:
    """Return the table as Markdown; bold is best and resolved."""
    header = [*table.labels, *table.columns]
    body = []
    for labels, entries in table.rows:
        texts = [f"**{e.text}**" if e.bold else e.text + (f" {e.mark}" if e.mark else "") for e in entries]
        body.append([*labels, *texts])
    return markdown_lines(header, body) + "".join(f"\n{note}\n" for note in table.notes)


def latex(table: Table) -> str:
    """Return the table as a LaTeX `tabular` with booktabs rules."""
    body = []
    for labels, entries in table.rows:
        texts = []
        for entry in entries:
            text = _tex(entry.text).replace("±", r"$\pm$")
            texts.append(
                rf"\textbf{{{text}}}" if entry.bold else text + (f"$^{{{_tex(entry.mark)}}}$" * bool(entry.mark))
            )
        body.append([*(_tex(label) for label in labels), *texts])
    names = [_tex(name) for name in (*table.labels, *table.columns)]
    return _tabular(names, body, len(table.labels), [table.title, *table.notes])


def latex_lines(header: Sequence[str], body: Sequence[Sequence[str]], labels: int, notes: Sequence[str]) -> str:
    """Return ready texts as a LaTeX `tabular`; the first `labels` columns are left-aligned."""
    rows = [[_tex(text).replace("±", r"$\pm$") for text in row] for row in body]
    return _tabular([_tex(name) for name in header], rows, labels, notes)


def _tabular(header: Sequence[str], body: Sequence[Sequence[str]], labels: int, notes: Sequence[str]) -> str:
    lines = [f"% {notes[0]}", rf"\begin{{tabular}}{{{'l' * labels}{'r' * (len(header) - labels)}}}"]
    lines += [r"\toprule", rf"{' & '.join(header)} \\", r"\midrule"]
    lines += [rf"{' & '.join(row)} \\" for row in body]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {note}" for note in notes[1:])]) + "\n"


def as_json(table: Table) -> str:
    """Return the table as JSON: one object a row."""
    rows = []
    for labels, entries in table.rows:
        row: dict[str, object] = dict(zip(table.labels, labels, strict=True))
        for metric, entry in zip(table.columns, entries, strict=True):
            row[metric] = {
                "mean": entry.value,
                "se": entry.stderr,
                "low": entry.low,
                "high": entry.high,
                "n": entry.n,
                "best": entry.bold,
                "note": MARKS.get(entry.mark, "") or entry.reason,
            }
        rows.append(row)
    return json.dumps({"title": table.title, "rows": rows, "notes": list(table.notes)}, indent=1) + "\n"


def _plain(entry: Entry) -> str:
    return entry.text + ("*" if entry.bold else "") + entry.mark


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 1 for c in text)


def csv_lines(lines: Sequence[Sequence[str]]) -> str:
    """Return ready texts as CSV."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(lines)
    return sink.getvalue()


def markdown_lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of ready texts."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, body)]) + "\n"


def _tex(text: str) -> str:
    # The arrow first: it brings its own special characters.
    parts = text.split("->")
    specials = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
    return r"$\rightarrow$".join("".join(specials.get(c, c) for c in part) for part in parts)
