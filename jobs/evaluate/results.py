"""Per-item results: the Parquet file, means with standard errors, the metrics of a manifest."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jobs.probe.metrics import in_range

BASE = "base"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an item's log-likelihoods mean: scores of the choices, is the best right (also per character), bits."""

    scores: tuple[float, ...]
    acc: float
    acc_norm: float
    answer_bpb: float


@dataclass(frozen=True, slots=True)
class Scored:
    """One item under one intervention."""

    task: str
    item: str
    target: int
    outcome: Outcome
    intervention: str = BASE


def items_parquet(rows: Iterable[Scored]) -> bytes:
    """Return `items.parquet`: task, item, choice scores, target, acc, acc_norm, answer_bpb, intervention."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda r: (r.intervention != BASE, r.intervention, r.task, len(r.item), r.item))
    columns = {
        "task": pa.array([r.task for r in ordered], pa.string()),
        "item": pa.array([r.item for r in ordered], pa.string()),
        "scores": pa.array([list(r.outcome.scores) for r in ordered], pa.list_(pa.float64())),
        "target": pa.array([r.target for r in ordered], pa.int32()),
        "acc": pa.array([r.outcome.acc for r in ordered], pa.float64()),
        "acc_norm": pa.array([r.outcome.acc_norm for r in ordered], pa.float64()),
        "answer_bpb": pa.array([r.outcome.answer_bpb for r in ordered], pa.float64()),
        "intervention": pa.array([r.intervention for r in ordered], pa.string()),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error and the number of values."""

    value: float
    stderr: float
    n: int

    @classmethod
    def of(cls, values: ArrayLike, name: str, low: float = -math.inf, high: float = math.inf) -> Mean:
        """Return the mean of `values`; refused when it leaves [low, high]."""
        array = np.asarray(values, dtype=np.float64)
        spread = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else 0.0
        return cls(in_range(name, float(array.mean()), low, high), in_range(name, spread), len(array))

    @classmethod
    def over(cls, means: Sequence[Mean]) -> Mean:
        """Return the plain average of independent means (one per task)."""
        value = float(np.mean([mean.value for mean in means]))
        stderr = math.sqrt(sum(mean.stderr**2 for mean in means)) / len(means)
        return cls(value, stderr, sum(mean.n for mean in means))


class Table:
    """Metrics of one evaluation, with what its manifest says about each."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.stderr: dict[str, float] = {}
        self.n: dict[str, int] = {}
        self.chance: dict[str, float] = {}

    def add(self, name: str, mean: Mean, chance: float | None = None) -> None:
        self.metrics[name] = mean.value
        self.stderr[name] = mean.stderr
        self.n[name] = mean.n
        if chance is not None:
            self.chance[name] = chance

    @property
    def info(self) -> dict[str, Any]:
        return {"stderr": self.stderr, "n": self.n, "chance": self.chance}
