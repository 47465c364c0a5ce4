"""Sums over the steps since the last logged one: part of a state, so that a resumed run logs the same numbers.

Two ends of training are seen here, over windows of `log_every` steps:
- diverged: the mean language-model loss of a window is more than DIVERGED_NATS above log(vocabulary), the loss of
  guessing uniformly;
- router collapsed: COLLAPSED_WINDOWS windows in a row in which the load entropy, mean over layers, lies within
  COLLAPSED_SHARE of its range [log2 k, log2 N] above its floor log2 k (every token to the same k experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jobs.train.errors import Diverged, RouterCollapsed

DIVERGED_NATS = 3.0
COLLAPSED_SHARE = 0.02
COLLAPSED_WINDOWS = 5
# The meter in a `state.json` of an earlier format was written while training went on: it may hold later steps too.
STATE_FORMAT = 2


def load_entropy(counts_LN: list[list[float]]) -> float:
    """Return the mean over layers of the entropy of the experts' load, in bits (0 for no layer)."""
    layers = []
    for counts in counts_LN:
        total = sum(counts)
        layers.append(-sum(c / total * math.log2(c / total) for c in counts if c) if total else 0.0)
    return sum(layers) / len(layers) if layers else 0.0


class Meter:
    """What was seen since the last logged step."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, float] = {}
        self.counts_LN: list[list[float]] = []
        self.collapsed = 0

    def add(self, values: Mapping[str, float], counts_LN: list[list[float]]) -> None:
        """Add one step's values and expert counts [L, N]."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if not self.counts_LN:
            self.counts_LN = [list(row) for row in counts_LN]
        else:
            for mine, row in zip(self.counts_LN, counts_LN, strict=True):
                for expert, count in enumerate(row):
                    mine[expert] += count

    def take(self) -> dict[str, float]:
        """Return the means and the load balance (bits) of the window and begin a new one."""
        row = {name: total / self.steps for name, total in self.sums.items()}
        if self.counts_LN:
            row["routing/load_balance"] = load_entropy(self.counts_LN)
        self.clear()
        return row

    def clear(self) -> None:
        """Begin a new window."""
        self.steps, self.sums, self.counts_LN = 0, {}, []

    def judge(self, row: Mapping[str, float], vocab_size: int, top_k: int, num_experts: int, router: bool) -> None:
        """Raise Diverged or RouterCollapsed when the window `row` says so; `router`: a router is being trained."""
        loss = row["train/lm_loss"]
        limit = math.log(vocab_size) + DIVERGED_NATS
        if loss > limit:
            raise Diverged(
                f"training diverged: loss {loss:.2f}",
                cause=f"guessing every token with equal probability costs {math.log(vocab_size):.2f}",
                hint="lower lr, raise warmup_ratio or lower clip; the last committed state is kept",
            )
        balance = row.get("routing/load_balance")
        if balance is None or not router or not 0 < top_k < num_experts:
            return
        floor, ceiling = math.log2(top_k), math.log2(num_experts)
        self.collapsed = self.collapsed + 1 if balance < floor + COLLAPSED_SHARE * (ceiling - floor) else 0
        if self.collapsed >= COLLAPSED_WINDOWS:
            raise RouterCollapsed(
                f"the router collapsed: load entropy {balance:.3f} of {ceiling:.3f} bits",
                cause=f"{top_k} of {num_experts} experts get nearly every token",
                hint="raise balance.aux_coef or balance.bias_rate, or lower router_lr; the last state is kept",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the meter as JSON types; later steps do not change what was returned."""
        counts = [list(row) for row in self.counts_LN]
        return {"steps": self.steps, "sums": dict(self.sums), "counts": counts, "collapsed": self.collapsed}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Meter:
        """Return the meter that `to_json` described."""
        meter = cls()
        meter.steps, meter.collapsed = record["steps"], record["collapsed"]
        meter.sums = dict(record["sums"])
        meter.counts_LN = [list(row) for row in record["counts"]]
        return meter


def recorded_meter(state: Mapping[str, Any], assignments: Callable[[int], int | None]) -> tuple[Meter, bool]:
    """Return the meter of a `state.json` and whether it is that of the state's own step; if not, its window is empty.

    Formats before STATE_FORMAT count on in `sums` and `counts`, not in `steps`: the meter is right after no step, and
    where every layer counted the assignments of the last n steps, which `assignments(n)` returns (None: not known).
    """
    meter = Meter.from_json(state["meter"])
    if state["format"] >= STATE_FORMAT or not (meter.sums or meter.counts_LN):
        return meter, True
    expected = assignments(meter.steps) if meter.steps and meter.counts_LN else None
    if expected is not None and all(sum(row) == expected for row in meter.counts_LN):
        return meter, True
    own = meter.steps == 0  # a window that had just begun is empty
    meter.clear()
    return meter, own
