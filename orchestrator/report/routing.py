"""Routing figures from the arrays of probes: change over training, metrics by layer and token set, maps of experts."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.catalog.metrics import METRICS, describe
from orchestrator.errors import CorruptBlob
from orchestrator.report import plots
from orchestrator.report.collect import CellResult, Results

ARRAYS_BLOB = "probe.npz"
# "" = the language model.
COMPONENTS = ("", "encoder", "connector")
SIGHT_BLOB = "sight.npz"  # of the components that see: `<component>.<name of probe.npz>`
SHIFTS_BLOB = "routing_shift.npz"
# A map of more experts than this is drawn for the first and the last layer alone.
MANY_EXPERTS = 16
MAPS = {
    "coactivation": "share of the row's tokens that also chose the column",
    "weight_similarity": "cosine of the experts' weights",
    "output_similarity": "cosine of the experts' outputs on the same tokens",
}

BY_LAYER = {
    "expert_allocation_entropy": "entropy of the experts' loads (1 = even)",
    "expert_weight_entropy": "entropy of the routing weights (1 = even)",
    "router_margin": "router margin (only comparable between equal score functions)",
    "routing_distance": "L1 distance of mean routing to held-out text",
}
HELDOUT = "heldout"

Array = NDArray[Any]
Arrays = dict[str, Array]


def routing_maps(results: Results) -> str:
    """Return how routing changed over training, what it does per layer and token set, and maps of the experts."""
    curves = "".join(_over_training(results, component) for component in COMPONENTS)
    parts = [f'<div class="pair">{curves}</div>']
    for setting, component in itertools.product(results.settings, COMPONENTS):
        arrays = next((found for cell in setting.cells if (found := last(results, cell, component))), None)
        if not arrays:
            continue
        figures = [*_layer_maps(arrays), *_expert_maps(arrays)]
        maps_of = f'<div class="maps">{"".join(f"<div>{figure}</div>" for figure in figures)}</div>'
        name = f"{setting.name}: {component}" if component else setting.name
        parts.append(f"<details><summary>{escape(name)}</summary>{maps_of}</details>")
    return "".join(parts) if len(parts) > 1 else ""


def overlap(first_LTK: Array, second_LTK: Array, top: int | None = None) -> float:
    """Return the mean over layers and tokens of size(E and E') / max(size E, size E'); empty slots are -1.

    `top` = 1 compares the best experts alone. Against the final state this is the router saturation, and 1 minus the
    overlap of two neighbouring states is the expert change rate.
    """
    first, second = (_best(indices_LTK, top) for indices_LTK in (first_LTK, second_LTK))
    shared = (first[..., :, None] == second[..., None, :]) & (first[..., :, None] >= 0)
    larger = np.maximum((first >= 0).sum(-1), (second >= 0).sum(-1))
    counted = larger > 0
    return float((shared.any(-1).sum(-1)[counted] / larger[counted]).mean())


def _best(indices_LTK: Array, top: int | None) -> Array:
    if top is None:
        return indices_LTK
    order = np.argsort(indices_LTK < 0, axis=-1, kind="stable")  # real slots first, best first
    return np.take_along_axis(indices_LTK, order, axis=-1)[..., :top]


OVER_TRAINING = {
    "all": "router saturation (1 = as at the end)",
    "best": "router saturation of the best expert",
    "changed": "share of expert choices changed since the state before",
    "changed_share": "share of tokens with any expert changed since the state before",
}
ByName = dict[str, dict[float, list[float]]]


def over_training(results: Results, component: str = "") -> dict[str, ByName]:
    """Return curve (of `OVER_TRAINING`) -> setting -> fraction -> values, one a cell."""
    found: dict[str, ByName] = {name: {} for name in OVER_TRAINING}
    for setting in results.settings:
        for cell in setting.cells:
            samples = {
                at: arrays["sample"] for at, arrays in probes(results, cell, component).items() if "sample" in arrays
            }
            ats = sorted(samples)
            if not ats or len({sample.shape[1] for sample in samples.values()}) > 1:
                continue
            for at in ats:
                for name, top in (("all", None), ("best", 1)):
                    value = overlap(samples[at], samples[ats[-1]], top)
                    found[name].setdefault(setting.name, {}).setdefault(at, []).append(value)
            for before, after in itertools.pairwise(ats):
                pair = samples[before], samples[after]
                for name, value in (("changed", 1 - overlap(*pair)), ("changed_share", changed_share(*pair))):
                    found[name].setdefault(setting.name, {}).setdefault(after, []).append(value)
    return found


def changed_share(first_LTK: Array, second_LTK: Array) -> float:
    """Return the share of tokens and layers whose set of experts is not the same (LibMoE, appendix D.3)."""
    same = np.sort(first_LTK, axis=-1) == np.sort(second_LTK, axis=-1)
    return float(1 - same.all(-1).mean())


def _over_training(results: Results, component: str) -> str:
    """Return the curves of router saturation (all experts, best expert) and of the expert change rate."""
    found, start = over_training(results, component), f"{component}: " if component else ""
    return "".join(curves_of(found[name], start + label) for name, label in OVER_TRAINING.items())


def curves_of(found: Mapping[str, Mapping[float, Sequence[float]]], label: str) -> str:
    """Return one curve a setting over the evaluated fractions."""
    lines = [plots.band(name, by_at) for name, by_at in found.items()]
    return plots.curves(lines, label, axis_x="fraction of the last phase")


def _layer_maps(arrays: Arrays) -> list[str]:
    """Return maps of the metrics by token set (rows) and layer (columns)."""
    sets = [name.removesuffix(".counts") for name in arrays if name.endswith(".counts")]
    figures = []
    for metric, label in (BY_LAYER | _of_packages(arrays)).items():
        values: dict[tuple[int, int], float] = {}
        rows = [name for name in sets if metric != "routing_distance" or name != HELDOUT]
        for row, name in enumerate(rows):
            for layer, value in enumerate(by_layer(arrays, name, metric)):
                values[row, layer] = float(value)
        if values:
            layers = [str(layer) for layer in range(1 + max(layer for _, layer in values))]
            figures.append(plots.heatmap(rows, layers, values, label=f"{label}, by layer", text=lambda v: f"{v:.2f}"))
    return figures


def _of_packages(arrays: Arrays) -> dict[str, str]:
    """Return the metrics of other packages that the arrays hold by layer, with what they say of themselves."""
    own = {name.removeprefix(f"{HELDOUT}."): array for name, array in arrays.items() if name.startswith(f"{HELDOUT}.")}
    names = (name for name, array in own.items() if array.ndim == 1 and name not in METRICS.builtins)
    return {name: describe(name) for name in names}


def by_layer(arrays: Arrays, name: str, metric: str) -> Array:
    """Return a metric of the token set `name` by layer, empty when it was not probed."""
    if metric != "routing_distance":
        return arrays.get(f"{name}.{metric}", np.zeros(0))
    if f"{name}.scores" not in arrays or f"{HELDOUT}.scores" not in arrays:
        return np.zeros(0)
    ours, theirs = arrays[f"{name}.scores"], arrays[f"{HELDOUT}.scores"]
    distance: Array = np.abs(ours / ours.sum(-1, keepdims=True) - theirs / theirs.sum(-1, keepdims=True)).sum(-1)
    return distance


def _expert_maps(arrays: Arrays) -> list[str]:
    """Return maps of every pair of experts, layer by layer."""
    figures = []
    for name, label in MAPS.items():
        if name not in arrays and name != "coactivation":
            continue
        maps = coactivation(arrays[f"{HELDOUT}.pairs"]) if name == "coactivation" else arrays[name]
        layers = range(len(maps)) if maps.shape[1] <= MANY_EXPERTS else sorted({0, len(maps) - 1})
        for layer in layers:
            figures.append(expert_map(maps[layer], f"layer {layer}: {label}"))
    return figures


def expert_map(pairs_NN: Array, label: str) -> str:
    """Return the map of every pair of experts, without an expert with itself."""
    experts = [str(i) for i in range(len(pairs_NN))]
    values = {(i, j): float(pairs_NN[i, j]) for i, j in itertools.permutations(range(len(experts)), 2)}
    return plots.heatmap(experts, experts, values, label=label)


def probes(results: Results, cell: CellResult, component: str = "") -> dict[float, Arrays]:
    """Return the arrays of the cell's probes by fraction: of the text, or of a component of a model's vision side."""
    if not component:
        return _arrays(results, cell, ARRAYS_BLOB)
    start, found = f"{component}.", _arrays(results, cell, SIGHT_BLOB)
    own = {
        at: {name.removeprefix(start): a for name, a in one.items() if name.startswith(start)}
        for at, one in found.items()
    }
    return {at: arrays for at, arrays in own.items() if arrays}


def shifts(results: Results, cell: CellResult) -> Arrays:
    """Return how far routing moved by layer on each shifted task of the cell's last state, {} where not measured."""
    found = _arrays(results, cell, SHIFTS_BLOB)
    return found[max(found)] if found else {}


def _arrays(results: Results, cell: CellResult, blob: str) -> dict[float, Arrays]:
    name = (blob, cell.id)
    if name not in results.memory:
        found = {}
        for result in cell.document["results"]:
            manifest = results.manifests.get(result["key"])
            if manifest and any(one.name == blob for one in manifest.blobs):
                try:
                    body = results.store.artifacts.read(manifest.blob(blob))
                except CorruptBlob as error:
                    results.damaged[manifest.key] = error.cause
                    continue
                with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                    found[float(result["at"])] = {key: arrays[key] for key in arrays.files}
        results.memory[name] = found
    arrays_of: dict[float, Arrays] = results.memory[name]
    return arrays_of


def last(results: Results, cell: CellResult, component: str = "") -> Arrays:
    """Return the arrays of the cell's last probe, {} when there is none."""
    found = probes(results, cell, component)
    return found[max(found)] if found else {}


def coactivation(pairs_LNN: Array) -> Array:
    """Return the share of the row's tokens that also chose the column."""
    uses = np.diagonal(pairs_LNN, axis1=1, axis2=2)[..., None].astype(np.float64)
    return np.asarray(np.divide(pairs_LNN, uses, out=np.zeros(pairs_LNN.shape), where=uses > 0))
