"""Figures of the papers from the arrays of probes: by layer, by token set, expert loads, co-activation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from orchestrator.report import charts, plots, routing
from orchestrator.report.collect import CellResult, Results
from orchestrator.report.loads import counts_of, load_map
from orchestrator.report.papers.choice import chosen, short_names
from orchestrator.report.papers.declared import Exhibit
from orchestrator.report.papers.forms import Made

# Styles that change words and no sentence (DecodingTrust); MoE-RBench shows the means of the two kinds.
WORD_STYLES = ("augment", "shake_w")
# LibMoE shows layers 4 and 12 of 16: the ends of the first and the third quarter.
SHOWN_DEPTHS = (0.25, 0.75)


def probed(results: Results, exhibit: Exhibit) -> Made:
    """Return router saturation or the share of changed choices over training, one curve a setting."""
    names = {"saturation": ("all", "best"), "changed": ("changed", "changed_share")}[exhibit.probe]
    figures, called = [], short_names(chosen(results, exhibit), str(exhibit.lines))
    for component in exhibit.components or ("",):
        found, start = routing.over_training(results, component), f"{component}: " if component else ""
        for name in names:
            short = {called[setting]: points for setting, points in found[name].items() if setting in called}
            figures.append(routing.curves_of(short, start + routing.OVER_TRAINING[name]))
    return Made(figures=tuple(filter(None, figures)))


def layers(results: Results, exhibit: Exhibit) -> Made:
    """Return one curve a setting over the layers, one panel a token set."""
    factor = str(exhibit.lines)
    panels: dict[str, list[plots.Line]] = {}
    settings = chosen(results, exhibit, (factor,))
    called = short_names(settings, factor)
    for setting in settings:
        for name, by_cell in _by_layer(results, setting.cells, exhibit).items():
            by_layer: dict[int, list[float]] = {}
            for values_L in by_cell:
                for layer, value in enumerate(values_L):
                    by_layer.setdefault(layer, []).append(float(value))
            panels.setdefault(name, []).append(plots.band(called[setting.name], by_layer))
    figures = [
        plots.curves(lines, f"{exhibit.layer_metric}: {name}", axis_x="layer")
        for name, lines in panels.items()
        if not exhibit.sets or name in exhibit.sets
    ]
    absent = [name for name in exhibit.sets if name not in panels]
    lacks = (f"no probe of {', '.join(absent)}",) if absent and panels else ()
    return Made(figures=tuple(filter(None, figures)), lacks=lacks)


def sets(results: Results, exhibit: Exhibit) -> Made:
    """Return one chart of bars per token set: the metric's mean over layers of each setting."""
    panels: dict[str, list[charts.Bar]] = {}
    for setting in chosen(results, exhibit, (exhibit.x,)):
        for name, by_cell in _by_layer(results, setting.cells, exhibit).items():
            mean = float(np.mean([np.mean(values_L) for values_L in by_cell]))
            panels.setdefault(name, []).append(charts.Bar(str(setting.factors[exhibit.x]), mean))
    figures = [charts.bars(shown, f"{exhibit.layer_metric}: {name}") for name, shown in panels.items()]
    return Made(figures=tuple(figures))


def loads(results: Results, exhibit: Exhibit) -> Made:
    """Return the experts' loads by layer of every chosen setting, on one scale of colours."""
    counted = {
        setting.name: counts
        for setting in chosen(results, exhibit)
        if (counts := next((c for cell in setting.cells if (c := counts_of(results, cell.document))), None))
    }
    rows = [row for counts in counted.values() for row in counts if sum(row)]
    reach = max((abs(count * len(row) / sum(row) - 1) for row in rows for count in row), default=0.0)
    figures = [f"<div><h4>{name}</h4>{load_map(counts, reach)}</div>" for name, counts in counted.items()]
    return Made(figures=tuple(figures))


def coactivation(results: Results, exhibit: Exhibit) -> Made:
    """Return maps of the experts' co-activation at every probed state, in an early and a late layer."""
    figures = []
    for setting in chosen(results, exhibit):
        cell = next((cell for cell in setting.cells if routing.probes(results, cell)), None)
        for at, arrays in sorted(routing.probes(results, cell).items()) if cell else ():
            maps_LNN = routing.coactivation(arrays[f"{routing.HELDOUT}.pairs"])
            for layer in dict.fromkeys(round(depth * (len(maps_LNN) - 1)) for depth in SHOWN_DEPTHS):
                figures.append(
                    routing.expert_map(maps_LNN[layer], f"layer {layer} at {at:g} of the run: co-activation")
                )
    return Made(figures=tuple(figures))


def shift(results: Results, exhibit: Exhibit) -> Made:
    """Return per setting a map of routing's distance from the clean items: styles, their two kinds, by layer."""
    figures = []
    for setting in chosen(results, exhibit):
        cell = next((cell for cell in setting.cells if routing.shifts(results, cell)), None)
        if cell is None:
            continue
        moved = routing.shifts(results, cell)
        words = [name for name in moved if name.removeprefix("sst2_") in WORD_STYLES]
        whole = [name for name in moved if name not in words]
        means = {"word-level": words, "sentence-level": whole}
        rows = {name: np.mean([moved[one] for one in kind], axis=0) for name, kind in means.items() if kind} | moved
        values = {(i, layer): float(v) for i, row in enumerate(rows.values()) for layer, v in enumerate(row)}
        names = [str(layer) for layer in range(1 + max(layer for _, layer in values))]
        label = f"{setting.name}: L1 distance of mean routing, by layer"
        figures.append(plots.heatmap(list(rows), names, values, label=label, text=lambda v: f"{v:.3f}"))
    return Made(figures=tuple(figures))


def _by_layer(results: Results, cells: Sequence[CellResult], exhibit: Exhibit) -> dict[str, list[routing.Array]]:
    """Return token set -> the metric by layer of every cell; of the experts' likeness the mean over pairs.

    Sets of a component that sees are called `<component>, <set>`.
    """
    found: dict[str, list[routing.Array]] = {}
    for cell, component in itertools.product(cells, exhibit.components or ("",)):
        arrays, start = routing.last(results, cell, component), f"{component}, " if component else ""
        if exhibit.layer_metric in arrays and arrays[exhibit.layer_metric].ndim == 3:
            pairs_LNN = arrays[exhibit.layer_metric]
            off = ~np.eye(pairs_LNN.shape[-1], dtype=bool)
            found.setdefault(f"{start}experts", []).append(pairs_LNN[:, off].mean(-1))
            continue
        for name in (name.removesuffix(".counts") for name in arrays if name.endswith(".counts")):
            values_L = routing.by_layer(arrays, name, exhibit.layer_metric)
            if len(values_L) and not (name == routing.HELDOUT and exhibit.layer_metric == "routing_distance"):
                found.setdefault(start + name, []).append(values_L)
    return found
