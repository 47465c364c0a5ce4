"""What of a training phase cannot be, beyond single fields: its data, its adapters, and when it stops early."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.catalog.pins import package_of
from orchestrator.catalog.routers import kind_of
from orchestrator.errors import did_you_mean
from orchestrator.spec.cell import Cell, TrainSpec
from orchestrator.spec.data import unread
from orchestrator.spec.fields import Path

Finding = tuple[Path, str, str]  # field path, message, hint

ADAPTED = ("attention", "expert", "routed_expert", "shared_expert")


def stopping_findings(name: str, train: TrainSpec) -> Iterator[Finding]:
    """Yield why a phase would not stop early in spite of what is asked for, or could not."""
    stop = train.stop
    if stop.metric and not (stop.patience or stop.below):
        message = f"stop.metric {stop.metric!r} has no condition"
        yield (name, "stop", "metric"), message, "set stop.patience or stop.below"
    if stop.metric and stop.every > train.steps > 0:
        message = f"stop.every {stop.every} is longer than the {train.steps} steps of {name}"
        yield (name, "stop", "every"), message, "take a shorter window"
    if stop.metric and stop.improvement and not stop.patience:
        message = "stop.improvement has no effect without stop.patience"
        yield (name, "stop", "improvement"), message, "set stop.patience, or remove it"


def data_findings(name: str, train: TrainSpec) -> Iterator[Finding]:
    """Yield what of a phase's data does not go together."""
    data, path = train.data, (name, "data")
    if data.task and (no_effect := unread(data.format, "task")):
        message = f"data.task {data.task!r} has no effect: {no_effect}"
        yield (*path, "task"), message, 'set data.format: instruction, or task: ""'
    for source in [corpus.source for corpus in data.corpora] or [data.source]:
        if data.task and data.format == "instruction" and package_of(source):
            message = f"data.task {data.task!r}: {source} holds prompts and answers, no labels"
            yield (*path, "task"), message, 'name a classification as source (docs/data.md), or task: ""'
    if data.corpora and data.mix.rows:
        yield (*path, "mix", "rows"), "examples are mixed into one source, not into corpora", "make them a corpus"
    for corpus in data.corpora:
        if not corpus.source:
            yield (*path, "corpora", corpus.name), f"corpus {corpus.name!r} has no source", "name where it comes from"


def adapter_findings(name: str, cell: Cell, train: TrainSpec) -> Iterator[Finding]:
    """Yield what of a cell's model cannot have the adapters that are asked for."""
    path, words = (name, "adapter", "targets"), [word.strip() for word in train.adapter.targets.split("+")]
    for word in words:
        if word not in ADAPTED:
            yield path, f"targets {train.adapter.targets!r}: {word!r} is nothing to adapt", did_you_mean(word, ADAPTED)
    kind = kind_of(cell.model.moe)
    experts = {word for word in words if word in ADAPTED[1:]}
    if experts and not kind.routes:
        yield path, f"adapters on experts do not apply: preset {kind.name!r} has none", "set targets: attention"
    elif words == ["shared_expert"] and not cell.model.moe.shared_experts:
        yield path, "adapters on shared experts do not apply: the model has none", "name other targets"
    if not kind.routes and train.adapter.router == "trained":
        message = f"adapter.router 'trained' does not apply: preset {kind.name!r} has no router"
        yield (name, "adapter", "router"), message, "set router: frozen"
