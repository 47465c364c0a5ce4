"""The sections of the report page: each takes the results and returns HTML, "" when there is nothing to show."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from orchestrator.report import plots
from orchestrator.report.collect import Results, Setting
from orchestrator.report.differences import LANGUAGE_MODEL_METRICS, direction, to_baseline
from orchestrator.report.facts import stability
from orchestrator.report.loads import counts_of, load_map
from orchestrator.report.statistics import Comparison, pearson, summary
from orchestrator.report.tables import Table, differences, headline_metrics
from orchestrator.report.words import column_head, words_of

CURVES = ("train/loss", "train/lm_loss", "train/aux_loss", "train/grad_norm", "routing/load_balance")
MOST_PAIRS = 12
FEWEST_SETTINGS = 5  # with fewer, every correlation is near 1 or -1


def table(shown: Table) -> str:
    """Return a table of metrics as HTML; bold is best or resolved, the reason of an empty cell is its tooltip."""
    head = "".join(f'<th scope="col" class="label">{escape(name)}</th>' for name in shown.labels)
    head += "".join(map(column_head, shown.columns))
    body = []
    for labels, entries in shown.rows:
        cells = [f'<th scope="row">{escape(label)}</th>' for label in labels]
        for entry in entries:
            text = f"<strong>{escape(entry.text)}</strong>" if entry.bold else escape(entry.text)
            mark = f' <span class="mark">{escape(entry.mark)}</span>' if entry.mark else ""
            title = f' title="{escape(entry.reason)}"' if entry.reason else ""
            body_class = ' class="quiet"' if entry.mark else ""
            cells.append(f"<td{body_class}{title}>{text}{mark}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in shown.notes)
    return (
        f'<div class="scroll"><table><caption>{escape(shown.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<ul class="notes">{notes}</ul>'
    )


def difference_plots(results: Results) -> str:
    """Return the forest plots of the primary metrics and their table, then the plots of all others."""
    metrics = _deciding(results)
    found = to_baseline(results, metrics)
    if not found:
        said = dict.fromkeys(results.comparable(setting)[1] for setting in results.settings)
        reasons = [reason for reason in said if reason and reason != "this is the baseline"]
        return f"<p>No comparison: {escape('; '.join(reasons) or 'nothing that both were measured in')}.</p>"
    shown = f'<div class="pair">{_forests(results, metrics, found)}</div>{table(differences(results, metrics))}'
    others = [metric for metric in headline_metrics(results) if metric not in metrics]
    further = _forests(results, others, to_baseline(results, others))
    if not further:
        return shown
    note = "<p class='quiet'>Corrected over these metrics, apart from the ones above.</p>"
    return f'{shown}<details><summary>Further metrics</summary><div class="pair">{further}</div>{note}</details>'


def _forests(results: Results, metrics: Sequence[str], found: Mapping[tuple[str, str], Comparison]) -> str:
    """Return the forest plots of some metrics; those without any comparison are left out."""
    parts = []
    for metric in metrics:
        rows = []
        for setting in results.settings:
            comparison = found.get((setting.name, metric))
            if comparison is not None:
                title = f"{setting.name}: {comparison.difference:+.4f}; {comparison.verdict()}"
                ends = (comparison.low, comparison.high)
                rows.append(plots.Interval(setting.name, comparison.difference, *ends, comparison.resolved, title))
        sign = {-1: "lower is better", 1: "higher is better", 0: ""}[direction(metric)]
        name = words_of(metric)
        parts.append(plots.forest(rows, f"{name}, {sign}" if sign else name))
    return "".join(parts)


def training_curves(results: Results) -> str:
    """Return the training curves with seed bands and the changes of the frozen role."""
    rows = results.series(results.cells)
    present = {name for series in rows.values() for row in series[:3] for name in row}
    parts = []
    for metric in (name for name in CURVES if name in present):
        lines = []
        for setting in results.settings:
            by_step: dict[int, list[float]] = {}
            for cell in setting.cells:
                for row in rows.get(cell.id, ()):
                    value = row.get(metric)
                    if isinstance(value, (int, float)) and math.isfinite(value):
                        by_step.setdefault(int(row["step"]), []).append(float(value))
            if by_step:
                steps = sorted(by_step)
                means = [sum(by_step[s]) / len(by_step[s]) for s in steps]
                lows, highs = [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps]
                lines.append(plots.Line(setting.name, steps, means, lows, highs))
        parts.append(plots.curves(lines, words_of(metric), _all_phase_changes(results)))
    return f'<div class="pair">{"".join(parts)}</div>' + stability(results, rows) if any(parts) else ""


def progress_curves(results: Results) -> str:
    """Return the primary metrics at the evaluated fractions of the run."""
    fractions = sorted({at for cell in results.cells for at in cell.by_at})
    if len(fractions) < 2:
        return ""
    parts = []
    for metric in _deciding(results):
        lines = []
        for setting in results.settings:
            found = {at: list(setting.values(metric, at).values()) for at in fractions}
            ats = [at for at in fractions if found[at]]
            means = [sum(found[at]) / len(found[at]) for at in ats]
            bounds = [min(found[at]) for at in ats], [max(found[at]) for at in ats]
            lines.append(plots.Line(setting.name, ats, means, *bounds))
        parts.append(plots.curves(lines, words_of(metric), axis_x="fraction of the last phase"))
    return f'<div class="pair">{"".join(parts)}</div>' if any(parts) else ""


def factor_maps(results: Results) -> str:
    """Return one heat map of the first primary metric per pair of factors that vary together."""
    metric = next(iter(_deciding(results)), "")
    parts = []
    for i, first in enumerate(results.factors):
        for second in results.factors[i + 1 :]:
            both = [s for s in results.settings if first in s.factors and second in s.factors and s.values(metric)]
            rows = list(dict.fromkeys(str(s.factors[first]) for s in both))
            columns = list(dict.fromkeys(str(s.factors[second]) for s in both))
            if len(rows) < 2 or len(columns) < 2:
                continue
            found: dict[tuple[int, int], list[float]] = {}
            for s in both:
                place = rows.index(str(s.factors[first])), columns.index(str(s.factors[second]))
                found.setdefault(place, []).extend(s.values(metric).values())
            means = {place: sum(values) / len(values) for place, values in found.items()}
            label = f"{words_of(metric)}: {first} (rows) x {second} (columns)"
            parts.append(plots.heatmap(rows, columns, means, label=label, text=lambda v: f"{v:.3f}"))
    return "".join(parts)


def responses(results: Results) -> str:
    """Return curves of primary metrics and load balance over each numeric factor, the others as in the baseline."""
    metrics = [name for name in dict.fromkeys((*_deciding(results), "load_balance")) if name in results.metrics]
    parts = []
    for factor in results.factors:
        values: dict[float, Setting] = {}
        for setting in results.settings:
            baseline, _ = results.comparable(setting)
            one = baseline is not None and setting.factors.get(factor) != baseline.factors.get(factor)
            if factor in setting.factors and (one or _is_baseline(results, setting)):
                values[setting.factors[factor]] = setting
        if len(values) < 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            continue
        for metric in metrics:
            found = {value: list(values[value].values(metric).values()) for value in sorted(values)}
            xs = [value for value in found if found[value]]
            means = [sum(found[x]) / len(found[x]) for x in xs]
            line = plots.Line(words_of(metric), xs, means, [min(found[x]) for x in xs], [max(found[x]) for x in xs])
            parts.append(plots.curves([line], words_of(metric), axis_x=factor))
    return f'<div class="pair">{"".join(parts)}</div>' if any(parts) else ""


def _is_baseline(results: Results, setting: Setting) -> bool:
    return results.comparable(setting)[1] == "this is the baseline"


def expert_loads(results: Results) -> str:
    """Return one map of the experts' loads per setting, layers down, experts across."""
    shown = {}
    for setting in results.settings:
        counts = next((found for cell in setting.cells if (found := counts_of(results, cell.document))), None)
        if counts is not None:
            shown[setting.name] = counts
    rows = [row for counts in shown.values() for row in counts if sum(row)]
    reach = max((abs(count * len(row) / sum(row) - 1) for row in rows for count in row), default=0.0)
    parts = [f"<div><h3>{escape(name)}</h3>{load_map(counts, reach)}</div>" for name, counts in shown.items()]
    return f'<div class="maps">{"".join(parts)}</div>' if parts else ""


def correlations(results: Results) -> str:
    """Return how the first primary metric goes together with each of the others, across settings: small plots."""
    names = list(headline_metrics(results))
    means = {s.name: {m: sum(v) / len(v) for m in names if (v := list(s.values(m).values()))} for s in results.settings}
    first = next((name for name in (*results.primary, *names) if name in names), "")
    if len(means) < FEWEST_SETTINGS:
        return ""
    parts = []
    for second in names:
        both = {name: (row[first], row[second]) for name, row in means.items() if first in row and second in row}
        found = pearson([a for a, _ in both.values()], [b for _, b in both.values()])
        if second != first and found is not None and len(both) >= FEWEST_SETTINGS:
            parts.append((abs(found), plots.small_scatter(both, words_of(first), words_of(second), found)))
    if not parts:
        return ""
    parts.sort(key=lambda part: -part[0])
    shown = "".join(figure for _, figure in parts[:MOST_PAIRS])
    rest = f" The {MOST_PAIRS} closest of {len(parts)} are shown." if len(parts) > MOST_PAIRS else ""
    caution = "r of Pearson across settings, not causes; with few settings large values arise by chance."
    return f"<div class='small-multiples'>{shown}</div><p class='quiet'>{caution}{rest}</p>"


def pareto(results: Results) -> str:
    """Return quality against cost and against balance.

    A sweet point is on every front shown and resolved as better than the baseline; means alone make none.
    """
    quality = next(iter(_deciding(results)), "")
    sign = direction(quality)
    surely = {
        name
        for (name, _), one in (to_baseline(results, [quality]) if quality else {}).items()
        if one.resolved and sign * one.difference > 0
    }
    parts, fronts = [], Counter[str]()
    for label, value in (("active FLOPs per token", _flops), ("load_balance", _mean_of("load_balance"))):
        points = []
        for setting in results.settings:
            values, cost = list(setting.values(quality).values()), value(setting)
            if not values or cost is None or (quality in LANGUAGE_MODEL_METRICS and not setting.causal):
                continue
            points.append((setting.name, cost, summary(values).mean))
        if len({cost for _, cost, _ in points}) < 2 or not sign:
            continue
        better = 1 if label == "load_balance" else -1
        axis = words_of(label) if label == "load_balance" else label
        spots = []
        for name, cost, score in points:
            beaten = any(
                better * c >= better * cost and sign * q >= sign * score and (c, q) != (cost, score)
                for _, c, q in points
            )
            fronts[name] += not beaten
            told = f"{name}: {words_of(quality)} {score:.4f}, {axis} {cost:.4g}"
            spots.append(plots.Spot(name, cost, score, not beaten and name in surely, told))
        parts.append(plots.scatter(spots, axis, words_of(quality)))
    if not parts:
        return ""
    sweet = [escape(name) for name, count in fronts.items() if count == len(parts) and name in surely]
    if sweet:
        told = f"Sweet points (resolved as better than the baseline, on every front shown): {', '.join(sweet)}."
    else:
        told = "No sweet point: no setting on all fronts is resolved as better than the baseline."
    return f"<p>{told}</p><div class='pair'>{''.join(parts)}</div>"


def _deciding(results: Results) -> list[str]:
    """Return the primary metrics that were measured, the first of all where a grid names none."""
    return [metric for metric in results.primary if metric in results.metrics] or list(results.metrics[:1])


def phase_changes(results: Results, cell: Mapping[str, Any]) -> dict[float, str]:
    """Return step -> what is frozen from there on, for each change in the last training phase of a cell."""
    stages = results.document["stages"]
    phase = stages[cell["final"]]["phase"]
    train = [stages[key] for key in cell["stages"] if stages[key].get("phase") == phase and "start" in stages[key]]
    return {
        float(after["start"]): f"frozen: {after.get('frozen') or 'none'}"
        for before, after in itertools.pairwise(train)
        if before.get("frozen") != after.get("frozen")
    }


def _all_phase_changes(results: Results) -> dict[float, str]:
    steps = {step for cell in results.document["cells"] for step in phase_changes(results, cell)}
    return dict.fromkeys(steps, "freeze phase")


def _flops(setting: Setting) -> float | None:
    value = setting.cells[0].document.get("flops_per_token")
    return None if value is None else float(value)


def _mean_of(metric: str) -> Callable[[Setting], float | None]:
    def mean(setting: Setting) -> float | None:
        values = list(setting.values(metric).values())
        return sum(values) / len(values) if values else None

    return mean
