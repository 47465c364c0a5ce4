"""Versions of what decides a result's meaning: each enters the keys of its own results alone.

Raise one when a change makes other numbers: results of that preset, loss, suite or metric are made again, all others
keep their keys. What is not listed has version 1, and a version of 1 is not hashed. A change of everything that a kind
of stage makes raises `identity.KIND_VERSIONS` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestrator import registry
from orchestrator.catalog.benchmarks import BENCHMARK_OF, COLUMNS
from orchestrator.catalog.encoders import ENCODERS
from orchestrator.catalog.frames import FRAMES, PLACES
from orchestrator.catalog.freezing import FREEZING, parts_of
from orchestrator.catalog.gates import GATES
from orchestrator.catalog.losses import BY_FIELD
from orchestrator.catalog.metrics import BY_SUITE
from orchestrator.catalog.optimizers import OPTIMIZERS
from orchestrator.catalog.overflows import OVERFLOWS
from orchestrator.catalog.pins import package_of
from orchestrator.catalog.routers import ROUTERS, kind_of
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.catalog.sources import SOURCES, scheme_of
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.catalog.templates import TEMPLATES
from orchestrator.spec.cell import BalanceSpec, DataSpec, TaskSpec, TrainSpec
from orchestrator.spec.model import CHOICES, DEFAULTS, Model, Moe

# "preset NAME", "loss NAME", "suite NAME", "metric NAME", ..., as the functions below yield them -> version, from 2 on.
VERSIONS: dict[str, int] = {
    "scoring bf16": 2,  # routers and rotary tables are no longer rounded
    "removal from groups of two": 2,  # the other expert stays
    "mixed-in response after a template": 2,  # it joins the prompt in its template
}


# Names that have been seen to be ours: many cells have the same ones.
_PLAIN: set[str] = set()


def raised(names: Iterable[str]) -> dict[str, int | str]:
    """Return what a key hashes of `names`, {} as a rule.

    That is the version of what is ours and was raised, and whatever another package or a plugin file provides: the
    package with the declaration's version, or the digest of the file.
    """
    found: dict[str, int | str] = {}
    for name in names:
        if (version := VERSIONS.get(name, 1)) != 1:
            found[name] = version
        elif name in _PLAIN:
            continue
        elif registry.ours(name):
            _PLAIN.add(name)
        elif (outside := registry.identity(name)) is not None:
            found[name] = outside
    return found


def of_model(model: Model) -> Iterator[str]:
    """Yield what decides the meaning of a model: its backbone, preset, routing choices and the parts it has."""
    moe = model.moe
    yield f"backbone {model.backbone}"
    yield f"{ROUTERS.word} {moe.preset}"
    yield f"preset {moe.preset} {moe.variant}"
    if model.checkpoint:
        yield f"upcycle {model.upcycle or 'none'}"
    if model.shared_from:
        yield "shared experts of a dense model"
    if model.vision is not None:
        yield f"{ENCODERS.word} {model.vision.encoder}"
    yield f"expert {moe.expert}"
    if not kind_of(moe).routes:
        return
    yield from (f"{name} {getattr(moe, name)}" for name in CHOICES if name != "expert")
    yield f"{SELECTIONS.word} {moe.selection}"
    yield f"{GATES.word} {moe.gate}"
    yield f"{OVERFLOWS.word} {moe.overflow}"
    yield from (f"{FRAMES.word} {getattr(moe, place)}" for place in PLACES)
    yield from (name for name in DEFAULTS if name not in CHOICES and getattr(moe, name) != DEFAULTS[name])


def of_training(train: TrainSpec, collaboration_top: int) -> Iterator[str]:
    """Yield what decides the meaning of training steps: losses, frozen role, schedule, precision."""
    yield from of_balance(train.balance)
    yield f"loss over {train.loss}"
    yield f"{SCHEDULES.word} {train.schedule}"
    yield f"{OPTIMIZERS.word} {train.optimizer}"
    yield f"precision {train.precision}"
    if train.adapter.rank:
        yield "adapter lora"
    if train.data.weights:
        yield "weights of corpora"
    if train.freeze:
        yield from (f"{FREEZING.word} {part.rule or 'names'}" for part in parts_of(train.freeze))
    if train.expert_dropout:
        yield "expert_dropout"
    if collaboration_top:
        yield "collaboration_top"


def of_balance(balance: BalanceSpec) -> Iterator[str]:
    """Yield the losses that are on, of the load-balance loss its group and scope as well."""
    if balance.aux_coef:
        yield f"loss {balance.aux_variant}"
        yield f"aux_group {balance.aux_group}"
        yield f"aux_scope {balance.aux_scope}"
    for coefficient, schedule in ((balance.aux_coef, balance.aux_schedule), (balance.z_coef, balance.z_schedule)):
        if coefficient and schedule != "constant":
            yield f"{SCHEDULES.word} {schedule}"
    yield from (f"loss {kind.name}" for field, kind in BY_FIELD.items() if getattr(balance, field))
    yield from (f"loss {name}" for name in balance.losses)


def of_data(data: DataSpec, tasks: Iterable[str] = ()) -> Iterator[str]:
    """Yield what decides the meaning of prepared data."""
    yield f"data {data.format}"
    if scheme := scheme_of(data.source):
        yield f"{SOURCES.word} {scheme}"
    if data.format == "chat":
        yield f"{TEMPLATES.word} {data.template}"
    for source in (data.source, *(corpus.source for corpus in data.corpora)):
        if data.format == "vision" and package_of(source):
            yield f"questions {source.rpartition('/')[2]}"
    if data.task:
        yield f"classification {data.task}"
    for corpus in data.corpora:
        yield f"{SOURCES.word} {scheme_of(corpus.source)}"
    if data.mix.rows:
        yield "data mix"
        yield f"{SOURCES.word} {scheme_of(data.mix.source)}"
        if not data.mix.template.endswith("{prompt}"):
            yield "mixed-in response after a template"
    yield from (f"items {task}" for task in tasks)
    # A package says which splits are stored, and which of their items are sound.
    yield from (f"{TASKS.word} {task}" for task in tasks if task not in TASKS.builtins and task not in BENCHMARK_OF)


def of_evaluation(
    suite: str, tasks: Iterable[TaskSpec], benchmark: str = "", asked: Iterable[str] = ()
) -> Iterator[str]:
    """Yield what decides the meaning of a suite's results: the suite, its metrics, tasks and benchmark.

    `asked` are metrics of other packages.
    """
    if suite:
        yield f"suite {suite}"
    yield from (f"metric {metric}" for metric in (*BY_SUITE.get(suite, ()), *asked))
    for task in tasks:
        yield f"{'benchmark task' if benchmark else 'task'} {task.name}"
        if task.name in COLUMNS:
            yield f"metric {COLUMNS[task.name]}"
    if benchmark:
        yield f"benchmark {benchmark}"


def of_removal(suite: str, moe: Moe) -> Iterator[str]:
    """Yield what decides how experts are removed, where the suite removes some."""
    kind, groups = SUITES.builtins.get(suite), moe.n_group
    removes = kind is not None and kind.removes
    if removes and groups > 1 and moe.group_score == "top2_sum" and moe.num_experts == 2 * groups:
        yield "removal from groups of two"


def of_scoring(shots: str, precision: str, dola: str) -> Iterator[str]:
    """Yield how requests are scored or answered."""
    if shots:
        yield f"shots {shots}"
    yield f"scoring {precision}"
    if dola:
        yield "dola"
