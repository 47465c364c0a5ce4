"""From logits to what scores are made of, a few rows at a time: no logarithms of a whole distribution are written."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Logits that are reduced at once. On a CPU (1 MB in fp32) each pass reads the cache to which the one before it wrote;
# elsewhere (256 MB) the host waits for each of these parts.
LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}


def rows_at_once(vocabulary: int, device: str = "cpu") -> int:
    """Return how many rows of logits are reduced at once on a device of this type."""
    return max(1, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cuda"]) // vocabulary)


def reduced(
    parts: Iterable[Tensor], slot_m: NDArray[np.int64], target_m: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the log-probability of each target, and whether it is the greedy choice, [m] each.

    `parts` are logits [.,V] of consecutive slots; `slot_m` is the place of each target among all their rows.
    """
    order = np.argsort(slot_m, kind="stable")
    values, greedy = np.empty(len(slot_m), dtype=np.float32), np.empty(len(slot_m), dtype=bool)
    start = first = 0
    for logits in parts:
        last = int(np.searchsorted(slot_m[order], start + len(logits)))
        here = order[first:last]
        found, best = _of_part(logits, torch.from_numpy(slot_m[here] - start), torch.from_numpy(target_m[here]))
        values[here], greedy[here] = found.cpu().numpy(), best.cpu().numpy()
        start, first = start + len(logits), last
    return values, greedy


def _of_part(logits_nV: Tensor, row_m: Tensor, target_m: Tensor) -> tuple[Tensor, Tensor]:
    row_m, target_m = row_m.to(logits_nV.device), target_m.to(logits_nV.device)
    largest = logits_nV.amax(-1).float()
    # A softmax and its largest take half the time of a logarithm of a sum.
    sums = largest - logits_nV.softmax(-1, dtype=torch.float).amax(-1).log()
    chosen = logits_nV[row_m, target_m].float()
    greedy = chosen == largest[row_m]
    # Of equal ones the first is the greedy choice; a search for its place is slow and rarely needed.
    greedy[greedy.clone()] = logits_nV[row_m[greedy]].argmax(-1) == target_m[greedy]
    return chosen - sums[row_m], greedy
