"""The tokens that each expert got, by layer, as an evaluation counted them, and their map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report import plots
from orchestrator.report.collect import Results


def load_map(counts: Sequence[Sequence[float]], reach: float = 0.0) -> str:
    """Return the map of the experts' loads, 1 = an even share; `counts` are tokens by layer and expert.

    Colours are darkest `reach` away from 1, so that maps with the same one can be compared.
    """
    shares: dict[tuple[int, int], float] = {}
    for layer, row in enumerate(counts):
        total = sum(row) or 1
        shares |= {(layer, expert): count * len(row) / total for expert, count in enumerate(row)}
    names = [f"layer {i}" for i in range(len(counts))]
    experts = [str(i) for i in range(len(counts[0]))]
    return plots.heatmap(names, experts, shares, label="load relative to an even share", centre=1.0, reach=reach)


def counts_of(results: Results, cell: Mapping[str, Any]) -> list[list[float]] | None:
    """Return the tokens by layer and expert that an evaluation of the cell counted."""
    for result in sorted(cell["results"], key=lambda result: -float(result["at"])):
        manifest = results.manifests.get(result["key"])
        counts = manifest.info.get("expert_counts") if manifest else None
        if isinstance(counts, list) and counts and isinstance(counts[0], list):
            return counts
    return None
