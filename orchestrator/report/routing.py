"""Routing figures from the arrays of probes: saturation over training, co-activation and similarity of experts."""

from __future__ import annotations

import io
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import CorruptBlob
from orchestrator.report import plots
from orchestrator.report.collect import CellResult, Results

ARRAYS_BLOB = "probe.npz"
MOST_SETTINGS = 4
# A map of more experts than this is drawn for the first and the last layer alone.
MANY_EXPERTS = 16
MAPS = {
    "coactivation": "share of the row's tokens that also chose the column",
    "weight_similarity": "cosine of the experts' weights",
    "output_similarity": "cosine of the experts' outputs on the same tokens",
}

Arrays = dict[str, NDArray[Any]]


def routing_maps(results: Results) -> str:
    """Return how far routing had settled at each fraction, and maps of the experts of the last state per layer."""
    parts = [_saturation(results)]
    for setting in results.settings[:MOST_SETTINGS]:
        arrays = next((found for cell in setting.cells if (found := _last(results, cell))), None)
        if not arrays:
            continue
        figures = []
        for name, label in MAPS.items():
            maps = _coactivation(arrays["heldout.pairs"]) if name == "coactivation" else arrays[name]
            layers = range(len(maps)) if maps.shape[1] <= MANY_EXPERTS else sorted({0, len(maps) - 1})
            experts = [str(i) for i in range(maps.shape[1])]
            for layer in layers:
                values = {
                    (i, j): float(maps[layer, i, j]) for i in range(len(experts)) for j in range(len(experts)) if i != j
                }
                figure = plots.heatmap(experts, experts, values, label=f"layer {layer}: {label}")
                figures.append(f"<div>{figure}</div>")
        maps_of = f'<div class="maps">{"".join(figures)}</div>'
        parts.append(f"<details><summary>{escape(setting.name)}</summary>{maps_of}</details>")
    return "".join(parts)


def saturation(first_LTK: NDArray[Any], final_LTK: NDArray[Any]) -> float:
    """Return the mean over layers and tokens of size(E_t and E_T) / max(size E_t, size E_T); empty slots are -1."""
    shared = (first_LTK[..., :, None] == final_LTK[..., None, :]) & (first_LTK[..., :, None] >= 0)
    larger = np.maximum((first_LTK >= 0).sum(-1), (final_LTK >= 0).sum(-1))
    counted = larger > 0
    return float((shared.any(-1).sum(-1)[counted] / larger[counted]).mean())


def _saturation(results: Results) -> str:
    lines = []
    for setting in results.settings:
        by_at: dict[float, list[float]] = {}
        for cell in setting.cells:
            probes = _probes(results, cell)
            last = max(probes, default=0.0)
            for at, arrays in probes.items():
                if "sample" in arrays and arrays["sample"].shape[1] == probes[last]["sample"].shape[1]:
                    by_at.setdefault(at, []).append(saturation(arrays["sample"], probes[last]["sample"]))
        ats = sorted(by_at)
        means = [sum(by_at[at]) / len(by_at[at]) for at in ats]
        bounds = [min(by_at[at]) for at in ats], [max(by_at[at]) for at in ats]
        lines.append(plots.Line(setting.name, ats, means, *bounds))
    return plots.curves(lines, "router saturation (1 = as at the end)", axis_x="fraction of the last phase")


def _probes(results: Results, cell: CellResult) -> dict[float, Arrays]:
    """Return the arrays of the cell's probes by fraction."""
    name = ("probes", cell.id)
    if name not in results.memory:
        found = {}
        for result in cell.document["results"]:
            manifest = results.manifests.get(result["key"])
            if manifest and result["suite"] == "probe" and any(blob.name == ARRAYS_BLOB for blob in manifest.blobs):
                try:
                    body = results.store.artifacts.read(manifest.blob(ARRAYS_BLOB))
                except CorruptBlob:
                    continue
                with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                    found[float(result["at"])] = {key: arrays[key] for key in arrays.files}
        results.memory[name] = found
    probes: dict[float, Arrays] = results.memory[name]
    return probes


def _last(results: Results, cell: CellResult) -> Arrays:
    probes = _probes(results, cell)
    return probes[max(probes)] if probes else {}


def _coactivation(pairs_LNN: NDArray[Any]) -> NDArray[Any]:
    uses = np.diagonal(pairs_LNN, axis1=1, axis2=2)[..., None].astype(np.float64)
    return np.divide(pairs_LNN, uses, out=np.zeros(pairs_LNN.shape), where=uses > 0)
