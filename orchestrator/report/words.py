"""Metrics written out: name, unit, group of columns and meaning, for tables, figures and the page's definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

from orchestrator.catalog.benchmarks import SAFETY
from orchestrator.catalog.metrics import describe
from orchestrator.report.differences import direction
from orchestrator.spec.suites import judged

QUALITY, ROUTING, COST = "quality", "routing", "cost"
GROUPS = (QUALITY, ROUTING, SAFETY, COST)


@dataclass(frozen=True, slots=True)
class Words:
    """A metric written out; `unit` is "" where it has none."""

    name: str
    unit: str
    group: str
    meaning: str


_KNOWN = {
    "val_loss": Words("held-out loss", "nats a token", QUALITY, "mean cross-entropy of held-out text"),
    "bits_per_byte": Words("held-out bits per byte", "bits", QUALITY, "cross-entropy of held-out text over its bytes"),
    "answer_bpb": Words(
        "bits per byte of right answers", "bits", QUALITY, "cross-entropy of right answers given their questions"
    ),
    "reasoning_avg": Words("mean accuracy", "share", QUALITY, "mean of the tasks' headline accuracies"),
    "acc": Words("accuracy", "share", QUALITY, "share of items whose likeliest choice is right"),
    "acc_norm": Words("accuracy by length", "share", QUALITY, "accuracy with likelihoods divided by length"),
    "load_balance": Words("load balance", "bits", ROUTING, "entropy of the experts' shares of tokens"),
    "collaboration": Words("collaboration", "bits", ROUTING, "entropy of whom an expert is chosen together with"),
    "capacity": Words("capacity", "share", ROUTING, "accuracy lost without the least used expert of every layer"),
    "specialization": Words("specialization", "share", ROUTING, "accuracy lost under random routing"),
    "capacity_bpb": Words("capacity in bits", "bits", ROUTING, "answer_bpb gained without the least used experts"),
    "specialization_bpb": Words("specialization in bits", "bits", ROUTING, "answer_bpb gained under random routing"),
    "expert_allocation_entropy": Words("entropy of loads", "share", ROUTING, "1 = every expert gets as many tokens"),
    "expert_weight_entropy": Words("entropy of weights", "share", ROUTING, "1 = chosen experts have equal weights"),
    "router_margin": Words("router margin", "score", ROUTING, "best score minus second best"),
    "routing_distance": Words("routing distance", "", ROUTING, "L1 distance of mean routing to held-out text"),
    "routing_shift": Words("shift of routing", "", ROUTING, "L1 distance of mean routing, shifted to clean items"),
    "drop_top1": Words("without the best expert", "share", ROUTING, "accuracy change without the best expert"),
    "drop_top12": Words("without the best two", "share", ROUTING, "accuracy change without the best two experts"),
    "nq": Words("Natural Questions", "share", SAFETY, "generated answers that equal a right one"),
    "truthfulqa_mc1": Words("TruthfulQA MC1", "share", SAFETY, "the likeliest choice is the true one"),
    "truthfulqa_mc2": Words("TruthfulQA MC2", "share", SAFETY, "probability on the true choices"),
    "train/loss": Words("training loss", "nats a token", QUALITY, "what is minimised, with the balance losses"),
    "train/lm_loss": Words("language model's loss", "nats a token", QUALITY, "cross-entropy of the training text"),
    "train/aux_loss": Words("load-balance loss", "", ROUTING, "the balance losses, with their coefficients"),
    "train/grad_norm": Words("gradient norm", "", QUALITY, "before it is clipped"),
    "routing/load_balance": Words("load balance in training", "bits", ROUTING, "of the step's own tokens"),
    "cost/active": Words("active parameters", "M", COST, "parameters that one token goes through"),
    "cost/flops": Words("active FLOPs", "M a token", COST, "of a forward pass"),
    "cost/hours": Words("training", "h", COST, "time of one run of the setting, as if it shared nothing"),
    "train_loss": Words("training loss", "nats a token", QUALITY, "loss of the last steps"),
    "drop": Words("lost under shift", "share", SAFETY, "clean minus shifted accuracy"),
    "clean_acc": Words("clean accuracy", "share", SAFETY, "accuracy on the unshifted twin"),
}
_SAFE_TASKS = (SAFETY, "malicious", "cona", "controversial", "xstest", "advglue", "anli", "sst2", "snli", "glue")


def written(metric: str) -> Words:
    """Return a metric written out: `arc_easy/acc` is the accuracy of a task; what is unknown keeps its name."""
    task, _, last = metric.rpartition("/")
    if metric in _KNOWN:
        return _KNOWN[metric]
    known = _KNOWN.get(last)
    if task and known is not None:
        group = SAFETY if task.startswith(_SAFE_TASKS) else known.group
        return Words(f"{task}: {known.name}", known.unit, group, f"{task}: {known.meaning}")
    if judged(metric)[1] is not None or metric.startswith(_SAFE_TASKS):
        return Words(metric.replace("_", " "), "", SAFETY, f"{metric}, see docs/metrics.md")
    told = describe(metric)
    group = ROUTING if metric.startswith(("expert", "router", "null", "temperature")) else QUALITY
    return Words(metric.replace("_", " "), "", group, told)


def words_of(metric: str) -> str:
    """Return the name with its unit: `load balance (bits)`."""
    found = written(metric)
    return f"{found.name} ({found.unit})" if found.unit else found.name


def named(factors: Mapping[str, object]) -> str:
    """Return a setting in short: the values of its factors; a number says whose it is where there are several."""
    texts = {name: str(value) for name, value in factors.items() if str(value)}
    if len(factors) < 2:
        return ", ".join(texts.values()) or "-"
    return ", ".join(text if text[0].isalpha() else f"{name}={text}" for name, text in texts.items()) or "-"


def column_head(metric: str, attributes: str = "") -> str:
    """Return the head of a metric's column: its name, which leads to what it means, its better way, its unit."""
    found = written(metric)
    unit = f' <span class="unit">{escape(found.unit)}</span>' if found.unit else ""
    arrow = {-1: "\u2193", 1: "\u2191", 0: ""}[direction(metric)]
    return (
        f'<th scope="col"{attributes} title="{escape(f"{metric}: {found.meaning}")}">'
        f'<a href="#def-{escape(metric)}">{escape(found.name)}</a> {arrow}{unit}</th>'
    )


def grouped(metrics: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return the metrics by group, the groups in their order, each metric where it stood among its own."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for metric in metrics:
        found[written(metric).group].append(metric)
    return [(group, members) for group, members in found.items() if members]
