"""Tables of the papers: ours in the paper's form, the printed values, and settings as both have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from orchestrator.report import facts
from orchestrator.report.collect import Results, Setting
from orchestrator.report.papers import measured
from orchestrator.report.papers.declared import Entry, Exhibit

DENSE = "Dense"


@dataclass(frozen=True, slots=True)
class Lines:
    """A table of ready texts: the first `labels` columns name a row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int

    @property
    def caption(self) -> str:
        """What its title says beyond the exhibit's, below whose heading it stands."""
        return self.title.partition("; ")[2]


@dataclass(frozen=True, slots=True)
class Made:
    """What became of an exhibit: tables and figures (SVG in the page), and what could not be shown and why."""

    tables: tuple[Lines, ...] = ()
    figures: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures)


def table(results: Results, exhibit: Exhibit) -> Made:
    """Return our values in the paper's rows and columns, and the printed ones: beside ours only where they compare."""
    ours, beside, reasons, empty = [], [], dict[str, None](), dict.fromkeys(c.name for c in exhibit.columns)
    # One model of ours has one size and one data: the rows of the paper's several ones are one row here.
    labels = tuple(name for name in exhibit.labels if name != "data" and (name != "scale" or not exhibit.size))
    seen = set()
    for row in exhibit.rows:
        texts = [measured.text(results, exhibit, row, column) for column in exhibit.columns]
        named = tuple(_label(exhibit, row, name) for name in labels)
        if any(texts) and named not in seen:
            seen.add(named)
            ours.append((*named, *texts))
        both: list[str] = []
        for column, text in zip(exhibit.columns, texts, strict=True):
            reason = measured.otherwise(results, exhibit, row, column) if text else ""
            both += [row[column.name], "" if reason else text]
            if text:
                empty.pop(column.name, None)
            reasons.update(dict.fromkeys(filter(None, reason.split("; "))))
        beside.append((*(row[name] for name in exhibit.labels), *both))
    if not ours:
        return Made()
    title = f"{exhibit.paper}, {exhibit.name}: {exhibit.shows}"
    scale = results.document["scale"]
    header = tuple(name for column in exhibit.columns for name in (column.name, f"{column.name} (ours)"))
    own = Lines(
        f"{title}; ours at scale {scale}", (*labels, *(c.name for c in exhibit.columns)), tuple(ours), len(labels)
    )
    if any(text for line in beside for text in line[len(exhibit.labels) + 1 :: 2]):
        printed = Lines(f"{title}; printed, and ours", (*exhibit.labels, *header), tuple(beside), len(exhibit.labels))
    else:
        plain = tuple((*line[: len(exhibit.labels)], *line[len(exhibit.labels) :: 2]) for line in beside)
        names = (*exhibit.labels, *(column.name for column in exhibit.columns))
        printed = Lines(f"{title}; as printed in the paper", names, plain, len(exhibit.labels))
    lacks = [f"not measured here: {', '.join(empty)}"] if empty else []
    told = [f"printed values stand apart where ours were measured otherwise: {'; '.join(list(reasons)[:8])}"]
    return Made(tables=(own, printed), lacks=(*lacks, *(told if reasons else [])))


def _label(exhibit: Exhibit, row: Mapping[str, str], name: str) -> str:
    """Return how a row is called; the dense twins of the paper's sizes are one of ours."""
    dense = exhibit.dense_size and name == "method" and row[name].startswith(DENSE)
    return DENSE if dense else row[name]


def settings(results: Results, exhibit: Exhibit) -> Made:
    """Return the paper's settings beside those of our runs, one column a value that a setting of ours varies."""
    chosen: dict[str, Setting] = {}
    for setting in results.settings:
        chosen.setdefault(str(setting.factors.get(exhibit.by, "")) or "ours", setting)
    rows = []
    for name, (path, printed) in exhibit.settings.items():
        own = [_setting(setting, path) for setting in chosen.values()]
        rows.append((name, printed, *own))
    header = ("setting", "paper", *(f"{name} ({results.document['scale']})" for name in chosen))
    return Made(tables=(Lines(f"{exhibit.paper}, {exhibit.name}: {exhibit.shows}", header, tuple(rows), 1),))


def components(results: Results, exhibit: Exhibit) -> Made:
    """Return the parameters of each component of a model that sees, setting by setting."""
    rows = []
    for setting in results.settings:
        counted = setting.cells[0].document.get("parameters", {})
        if "encoder" in counted:
            texts = [f"{counted[name] / 1e6:,.4g} M" for name in ("encoder", "connector", "language", "total")]
            rows.append((setting.name, *texts))
    if not rows:
        return Made()
    header = ("setting", "vision encoder", "connector", "language model", "all")
    title = f"{exhibit.paper}, {exhibit.name}: {exhibit.shows}; ours at scale {results.document['scale']}"
    return Made(tables=(Lines(title, header, tuple(rows), 1),))


def times(results: Results, exhibit: Exhibit) -> Made:
    """Return size, compute, time and devices of one run of each setting."""
    rows = facts.cost_rows(results)
    if not rows:
        return Made()
    title = f"{exhibit.paper}, {exhibit.name}: {exhibit.shows}; ours at scale {results.document['scale']}"
    return Made(tables=(Lines(title, facts.COSTS, tuple(rows), 1),))


def _setting(setting: Setting, path: str) -> str:
    """Return what our run of a setting has at `path` of its cell; "" where it has no such field."""
    cell = setting.cells[0].document
    resolved: Entry = cell.get("resolved", {})
    kind, _, name = path.partition(".")
    if kind == "task":
        tasks = (resolved.get("evaluate") or {}).get("tasks", [])
        task = next((task for task in tasks if task["name"] == name), None)
        if task is None:
            return "not evaluated"
        of = f", {task['limit']} items" if task.get("limit") else ""
        return f"{task.get('shots', 0)} shots, {task.get('metric', 'acc')}{of}"
    if kind == "count":
        return _count(cell, name)
    found: object = resolved
    for part in filter(None, path.split(".")):
        found = found.get(part) if isinstance(found, Mapping) else None
    return "" if found is None or not path else f"{found:g}" if isinstance(found, float) else str(found)


def _count(cell: Entry, name: str) -> str:
    if name == "tokens":
        train = cell.get("resolved", {}).get("pretrain") or {}
        number = 1.0
        for part in ("steps", "micro_batch", "accumulation", "sequence_length"):
            number *= float(train.get(part, 0))
        return f"{number / 1e6:.4g} M"
    if name == "batch":
        train = cell.get("resolved", {}).get("pretrain") or {}
        return str(train.get("micro_batch", 1) * train.get("accumulation", 1)) if train else ""
    if name == "head_dim":
        model = cell.get("resolved", {}).get("model") or {}
        return str(model.get("head_dim") or model.get("hidden_size", 0) // max(model.get("num_heads", 1), 1))
    return f"{cell.get('parameters', {}).get(name, 0) / 1e6:.4g} M"


def as_html(lines: Lines) -> str:
    """Return a table of ready texts as HTML."""
    head = "".join(
        f'<th scope="col"{" class=label" * (i < lines.labels)}>{escape(name)}</th>'
        for i, name in enumerate(lines.header)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<th scope='row'>{escape(text)}</th>" if i < lines.labels else f"<td>{escape(text)}</td>"
            for i, text in enumerate(row)
        )
        + "</tr>"
        for row in lines.rows
    )
    caption = f"<p class='quiet'>{escape(lines.caption)}</p>" if lines.caption else ""
    return f"{caption}<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
