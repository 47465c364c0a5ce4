"""Metrics: the columns of results. Ours by suite; those of other packages are computed by the suite `probe`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

READS = ("tokens", "totals")


@dataclass(frozen=True, slots=True)
class MetricKind:
    """One metric: what its column means, which values it can have, which are better, and how it is computed.

    A metric of another package is named in `evaluate.metrics` and computed by the suite `probe` on the held-out text
    and on each task's right answers. `code` is the dotted path of a function. With `reads` "tokens" it is (routing:
    jobs.moe.Routing[, parameters]) -> tensor [T], a value for each token of a layer and batch: the metric is the mean
    over the tokens that `routing.mask` holds, then over layers. With "totals" it is (totals:
    jobs.probe.accumulate.RoutingTotals[, parameters]) -> a value a layer [L], from counts, pairs and mean scores of the
    whole set. A layer's value outside `low`..`high` ends the evaluation as an error and is never a result. `parameters`
    is a frozen dataclass of scalars, None for none.

    `better` is 1 where higher is better, -1 where lower is, 0 where neither is. `leaks`: a router that sees later
    tokens makes the metric meaningless. `suites` compute one of ours, none where it belongs to single tasks.
    """

    name: str
    code: str = ""
    parameters: type | None = None
    low: float = -math.inf
    high: float = math.inf
    better: int = 0
    reads: str = "tokens"
    description: str = ""
    version: int = 1
    leaks: bool = False
    suites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reads not in READS or self.better not in (-1, 0, 1) or not self.low < self.high:
            raise ValueError(f"metric {self.name!r}: reads tokens or totals, better -1, 0 or 1, low below high")

    @property
    def how(self) -> str:
        """How a grid asks for one of ours."""
        return f"the suite {self.suites[0]} makes it: evaluate that" if self.suites else "leave it out"


LANGUAGE_MODEL = ("val_loss", "bits_per_byte")
EFFICIENCY = ("load_balance", "collaboration", "capacity", "specialization", "capacity_bpb", "specialization_bpb")
ROUTING = (
    "probe_load_balance",
    "probe_collaboration",
    "expert_allocation_entropy",
    "expert_weight_entropy",
    "router_margin",
)
OF_TOKENS = ("routing_distance", "null_share")
BLIND = "blind_acc"
OF_PICTURES = ("acc", BLIND, "sight", "answer_bpb")
DISTURBED = ("drop_top1", "drop_top12", "temperature_1", "temperature_0.1", "temperature_10")
SIMILARITY = ("expert_weight_similarity", "expert_output_similarity")
_ROBUST = ("adversarial", "ood")


def _ours(*names: str, better: int = 0, suites: tuple[str, ...] = (), leaks: bool = False) -> tuple[MetricKind, ...]:
    return tuple(MetricKind(name, better=better, leaks=leaks, suites=suites) for name in names)


# `<task>/` and a benchmark's or judge's name left out.
_OURS = (
    *_ours(*LANGUAGE_MODEL, better=-1, suites=("lm",), leaks=True),
    *_ours("exact_match", better=1),
    *_ours("acc", better=1, suites=("reasoning", "seeing", *_ROBUST)),
    MetricKind(BLIND, suites=("seeing",), description="accuracy of the same questions about pictures of other answers"),
    MetricKind("sight", better=1, suites=("seeing",), description="accuracy above the blind baseline"),
    *_ours("acc_norm", "reasoning_avg", better=1, suites=("reasoning",)),
    *_ours("answer_bpb", better=-1, suites=("reasoning", "seeing", "hallucination", *_ROBUST)),
    *_ours(*EFFICIENCY, better=1, suites=("efficiency",)),
    *_ours(*ROUTING, *SIMILARITY, *DISTURBED, suites=("probe", "seeing_probe")),
    *_ours(*OF_TOKENS, suites=("probe",)),
    *_ours("clean_acc", better=1, suites=_ROBUST),
    *_ours("drop", better=-1, suites=_ROBUST),
    *_ours("routing_shift", suites=("shifted_routing",)),
    *_ours("empty", suites=("safety", "over_refusal")),
    *_ours("nq", "truthfulqa_mc1", "truthfulqa_mc2", better=1),
    *_ours("perplexity", "ppl", better=-1, leaks=True),
    *_ours("train_loss", better=-1),
)
METRICS = Registry("metrics", "metric", MetricKind, {kind.name: kind for kind in _OURS})
# What the results of a suite hold; the metrics of single tasks belong to these.
BY_SUITE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {suite: tuple(one.name for one in _OURS if suite in one.suites) for one in _OURS for suite in one.suites}
)


def known(name: str) -> MetricKind | None:
    """Return what is known of a metric where results are shown: a broken package is no reason to show none."""
    try:
        return METRICS.find(name)
    except MoegridError:
        return None


def describe(name: str) -> str:
    """Return a metric's name with what it says of itself."""
    kind = known(name)
    return f"{name}: {kind.description}" if kind is not None and kind.description else name
