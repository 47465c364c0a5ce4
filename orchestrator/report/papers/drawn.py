"""Figures of the papers that metrics and series make: bars, curves, responses, radars, stacked drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.report import charts, plots
from orchestrator.report.collect import Results, Setting
from orchestrator.report.differences import direction
from orchestrator.report.papers.choice import chosen, short_names, split
from orchestrator.report.papers.declared import Exhibit
from orchestrator.report.papers.forms import Made
from orchestrator.report.statistics import summary


def bars(results: Results, exhibit: Exhibit) -> Made:
    """Return one chart of bars per panel and metric, with the average dashed."""
    metrics = exhibit.metrics or tuple(column.metric for column in exhibit.columns if column.metric)
    figures, lacks = [], _unmeasured(results, metrics)
    settings = chosen(results, exhibit, (exhibit.x,))
    for panel, members in split(results, exhibit, settings, exhibit.x).items():
        for metric in metrics:
            shown = []
            for setting in members:
                values = list(setting.values(metric).values())
                if values:
                    found, name = summary(values, results.most_seeds), str(setting.factors[exhibit.x])
                    group = name.partition("->")[0] if any("->" in str(s.factors[exhibit.x]) for s in members) else ""
                    strong = name == exhibit.mark
                    shown.append(charts.Bar(name, found.mean, found.low, found.high, strong, group))
            order = list(dict.fromkeys(bar.group for bar in shown))
            shown.sort(key=lambda bar: order.index(bar.group))
            figures.append(charts.bars(shown, f"{panel}: {metric}" if panel else metric))
    return Made(figures=tuple(filter(None, figures)), lacks=tuple(lacks))


def curves(results: Results, exhibit: Exhibit) -> Made:
    """Return curves over training: of a series, of metrics at the evaluated fractions, or of the probes."""
    if exhibit.probe:
        from orchestrator.report.papers.layers import probed

        return probed(results, exhibit)
    factor = exhibit.lines if isinstance(exhibit.lines, str) else ""
    settings = chosen(results, exhibit, (factor,))
    panels = split(results, exhibit, settings, factor)
    if exhibit.series:
        figures = [
            plots.curves(_series(results, members, exhibit, factor), _named(exhibit.series, panel))
            for panel, members in panels.items()
        ]
        return Made(figures=tuple(filter(None, figures)))
    if exhibit.normalised:
        return _normalised(results, exhibit, settings)
    lines = {metric: _over_run(settings, metric, factor) for metric in exhibit.at}
    figures = [plots.curves(found, metric, axis_x="fraction of the run") for metric, found in lines.items() if found]
    absent = [metric for metric, found in lines.items() if not any(len(line.xs) > 1 for line in found)]
    lacks = [f"not measured at several states of a run: {', '.join(absent)}"] if absent else []
    return Made(figures=tuple(filter(None, figures)), lacks=tuple(lacks))


def response(results: Results, exhibit: Exhibit) -> Made:
    """Return a metric over a numeric factor, one line a value of `lines`; a normalised one is drawn from 0 to 1."""
    figures = []
    factor = str(exhibit.lines) if isinstance(exhibit.lines, str) else ""
    for metric in exhibit.metrics:
        found: dict[str, dict[float, list[float]]] = {}
        for setting in chosen(results, exhibit, (exhibit.x,)):
            points = found.setdefault(str(setting.factors.get(factor, metric)), {})
            points.setdefault(float(setting.factors[exhibit.x]), []).extend(setting.values(metric).values())
        lines = [_response(name, points, exhibit.normalised) for name, points in found.items()]
        title = f"{metric}, normalised" if exhibit.normalised else metric
        figures.append(plots.curves([line for line in lines if line.xs], title, axis_x=exhibit.x))
    return Made(figures=tuple(filter(None, figures)), lacks=tuple(_unmeasured(results, exhibit.metrics)))


def _response(name: str, found: Mapping[float, Sequence[float]], normalised: bool) -> plots.Line:
    points = {x: found[x] for x in sorted(found) if found[x]}
    means = {x: sum(values) / len(values) for x, values in points.items()}
    scale = _unit(means.values()) if normalised else _same
    ends = f" ({min(means.values()):.4f} to {max(means.values()):.4f})" if means and normalised else ""
    return plots.Line(
        f"{name}{ends}",
        list(points),
        [scale(means[x]) for x in points],
        [scale(min(values)) for values in points.values()],
        [scale(max(values)) for values in points.values()],
    )


def radar(results: Results, exhibit: Exhibit) -> Made:
    """Return the chosen settings over all measured metrics, the best of them outside on every axis."""
    lines = exhibit.lines if isinstance(exhibit.lines, Mapping) else {}
    (factor, values), figures = next(iter(lines.items())), []
    settings = [s for s in chosen(results, exhibit, (factor,)) if str(s.factors[factor]) in values]
    for panel, members in split(results, exhibit, settings, factor).items():
        means = {str(s.factors[factor]): {m: _mean(s, m) for m in exhibit.metrics} for s in members}
        axes = [m for m in exhibit.metrics if means and all(row[m] is not None for row in means.values())]
        shares: dict[str, list[float]] = {name: [] for name in means}
        for metric in axes:
            column = {name: float(row[metric] or 0.0) for name, row in means.items()}
            best = max(column.values()) if direction(metric) >= 0 else min(column.values())
            for name, value in column.items():
                shares[name].append(_share(value, best, lower=direction(metric) < 0))
        told = {name: [f"{means[name][m]:.4f}" for m in axes] for name in means}
        chart = charts.radar([f"{m} ({'lower' if direction(m) < 0 else 'higher'})" for m in axes], shares, told)
        figures.append(f"<div><h4>{panel}</h4>{chart}</div>" if panel and chart else chart)
    return Made(figures=tuple(filter(None, figures)), lacks=tuple(_unmeasured(results, exhibit.metrics)))


def stacked(results: Results, exhibit: Exhibit) -> Made:
    """Return per setting and disturbance the drop of every task, on each other."""
    figures = []
    for metric in exhibit.metrics:
        tasks = [name.rpartition("/")[0] for name in results.metrics if name.endswith(f"/{metric}")]
        shown: dict[str, dict[str, float]] = {}
        for setting in chosen(results, exhibit, (exhibit.x,)):
            drops = {task: _mean(setting, f"{task}/{metric}") for task in tasks}
            if known := {task: -value for task, value in drops.items() if value is not None}:
                shown[str(setting.factors[exhibit.x])] = known
        figures.append(charts.stacked(shown, f"accuracy lost, {metric}, sum over tasks"))
    return Made(figures=tuple(filter(None, figures)))


def parts(results: Results, exhibit: Exhibit) -> Made:
    """Return for each data of the last phase how many rows each kind of question has."""
    shown: dict[str, list[charts.Bar]] = {}
    for setting in results.settings:
        cell = setting.cells[0].document
        trained = (cell.get("resolved", {}).get("instruct") or {}).get("data") or {}
        source = trained.get("source") or " and ".join(trained.get("corpora", {}))
        made = [results.manifests[key] for key in cell["stages"] if key in results.manifests]
        read = {parent for manifest in made if manifest.info.get("phase") == "instruct" for parent in manifest.parents}
        data = {
            parent
            for manifest in made
            if manifest.key in read and manifest.kind == "tokens"
            for parent in manifest.parents
        }
        for manifest in made:
            if manifest.key in data and manifest.kind == "data" and (counts := manifest.info.get("subtasks")):
                shown.setdefault(f"{source}, {sum(counts.values()):,} rows", _bars_of(counts))
    return Made(figures=tuple(charts.bars(bars, f"rows by kind of question: {name}") for name, bars in shown.items()))


def _bars_of(counts: Mapping[str, int]) -> list[charts.Bar]:
    return [charts.Bar(name, float(count)) for name, count in counts.items()]


def _series(results: Results, members: Sequence[Setting], exhibit: Exhibit, factor: str) -> list[plots.Line]:
    rows = results.series([cell for setting in members for cell in setting.cells])
    lines, called = [], short_names(members, factor)
    for setting in members:
        by_step: dict[int, list[float]] = {}
        for cell in setting.cells:
            for row in rows.get(cell.id, ()):
                value, step = row.get(exhibit.series), int(row["step"])
                late = exhibit.first_steps and step > exhibit.first_steps
                if isinstance(value, (int, float)) and math.isfinite(value) and not late:
                    by_step.setdefault(step, []).append(float(value))
        if by_step:
            lines.append(plots.band(called[setting.name], by_step))
    return lines


def _over_run(settings: Sequence[Setting], metric: str, factor: str) -> list[plots.Line]:
    lines, called = [], short_names(settings, factor)
    for setting in settings:
        by_at: dict[float, list[float]] = {}
        for cell in setting.cells:
            for at, metrics in cell.by_at.items():
                if metric in metrics:
                    by_at.setdefault(at, []).append(metrics[metric])
        if by_at:
            lines.append(plots.band(called[setting.name], by_at))
    return lines


def _normalised(results: Results, exhibit: Exhibit, settings: Sequence[Setting]) -> Made:
    """Return per setting all metrics over the run, each from its least to its greatest value."""
    figures, absent = [], dict[str, None]()
    for setting in settings:
        lines = []
        for metric in exhibit.at:
            found = _over_run([setting], metric, "")
            if not found or len(found[0].xs) < 2:
                absent[metric] = None
                continue
            line, scale = found[0], _unit(found[0].means)
            name = f"{metric} ({line.means[0]:.4f} to {line.means[-1]:.4f})"
            means = [scale(value) for value in line.means]
            lines.append(plots.Line(name, line.xs, means, means, means))
        figures.append(plots.curves(lines, f"{setting.name}: normalised", axis_x="fraction of the run"))
    lacks = [f"not measured at several states of a run: {', '.join(absent)}"] if absent else []
    return Made(figures=tuple(filter(None, figures)), lacks=tuple(lacks))


def _unmeasured(results: Results, metrics: Iterable[str]) -> list[str]:
    absent = [metric for metric in metrics if metric not in results.metrics]
    return [f"not measured here: {', '.join(absent)}"] if absent else []


def _mean(setting: Setting, metric: str) -> float | None:
    values = list(setting.values(metric).values())
    return sum(values) / len(values) if values else None


def _share(value: float, best: float, *, lower: bool) -> float:
    """Return how far out a value lies: 1 is the best, 0 worthless or of the other sign."""
    top, bottom = (best, value) if lower else (value, best)
    return min(1.0, max(0.0, top / bottom)) if bottom else float(value == best)


def _unit(values: Iterable[float]) -> Callable[[float], float]:
    known = list(values)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    return lambda value: (value - low) / ((high - low) or 1.0)


def _same(value: float) -> float:
    return value


def _named(metric: str, panel: str) -> str:
    return f"{metric}; {panel}" if panel else metric
