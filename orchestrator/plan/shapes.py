"""What of a grid is simulated: its stages by what decides their memory, each of these shapes once.

A question is plain data for `jobs.simulate.run`. It names shapes and how they are run, and neither data, seeds nor
learning rates: stages that differ in those alone have one answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

from orchestrator import __version__, resources
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import SUITES
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.stage import Stage
from orchestrator.spec.cell import ONE_COPY, Parallel, Resources
from orchestrator.spec.data import DataSpec
from orchestrator.spec.identity import canonical_text, plain
from orchestrator.spec.model import Model, MoESpec
from orchestrator.spec.rebuilding import build
from orchestrator.spec.training import BalanceSpec, TrainSpec
from orchestrator.spec.vision import FEATURES, PIXELS
from orchestrator.spec.work import EvaluateWork, GenerateWork, InitWork, TrainWork

Question: TypeAlias = Mapping[str, object]
TRAINING, EVALUATION, START = "training", "evaluation", "start"
# What the state has in which a model that sees begins.
TEXT, VISION = "text", "vision"


@dataclass(slots=True)
class Shape:
    """Stages of equal memory: what is asked of them, under which resources, and which they are."""

    question: dict[str, object]
    model: Model
    vocabulary: int
    resources: Resources
    device: str
    label: str
    train: TrainSpec | None = None
    stages: Counter[Stage] = field(default_factory=Counter)

    @property
    def kind(self) -> str:
        """What is simulated: training, an evaluation, or initial weights."""
        return str(self.question["kind"])

    @property
    def engine(self) -> str:
        """The engine that trains, "" of what does not train."""
        return str(self.question.get("engine", ""))

    @property
    def ranks(self) -> int:
        """The processes of one job."""
        return self.resources.nodes * self.resources.processes

    def fills(self, ranks: int) -> bool:
        """Return whether `ranks` can be laid out as these are."""
        parallel: Parallel = build(Parallel, self.question.get("parallel", {}))
        return not parallel.problem(ranks)

    def changed(self, resources: Resources, **fields: object) -> Shape:
        """Return the same stages under other resources and with other fields of execution."""
        question = {**self.question, **fields}
        if self.kind == TRAINING:
            question["ranks"] = resources.nodes * resources.processes
        return dataclasses.replace(self, question=question, resources=resources)


def shapes_of(graph: StageGraph) -> list[Shape]:
    """Return the shapes of all stages that hold a model, in the order in which the grid comes to them."""
    found: dict[str, Shape] = {}
    known: dict[tuple[int, ...], str] = {}
    for key, stage in graph.stages.items():
        cell = graph.cell(graph.users[key][0]).cell
        alike = (*map(id, stage.alike), id(cell.execution), cell.tokenizer.vocab_size)
        if alike not in known:
            shape = _shape(graph, stage, cell.tokenizer.vocab_size)
            known[alike] = "" if shape is None else _merged(found, shape)
        if known[alike]:
            found[known[alike]].stages[stage] += 1
    return list(found.values())


def _merged(found: dict[str, Shape], shape: Shape) -> str:
    """Add a shape to those that are known, and return its name among them."""
    parts = {name: value for name, value in shape.question.items() if name not in ("words", "reads")}
    name = canonical_text([parts, plain(shape.resources), shape.device])
    same = found.setdefault(name, shape)
    for several in ("words", "reads"):
        if several in shape.question:
            same.question[several] = sorted({*_texts(same.question[several]), *_texts(shape.question[several])})
    return name


def _texts(value: object) -> Iterable[str]:
    assert isinstance(value, list)
    return value


def _shape(graph: StageGraph, stage: Stage, vocabulary: int) -> Shape | None:
    work, resources, execution = stage.form, graph.resources(stage.key), graph.execution(stage.key)
    if not isinstance(work, (TrainWork, EvaluateWork, GenerateWork, InitWork)):
        return None
    asked: dict[str, object] = {"model": plain(_of_shape(work.model)), "vocab_size": vocabulary}
    device, train = execution.device, None
    if isinstance(work, TrainWork):
        train = work.conditions.train
        asked |= {"kind": TRAINING, "phase": work.conditions.phase, "train": plain(_of_memory(train))}
        asked |= {"engine": execution.engine, "ranks": resources.nodes * resources.processes, "words": [train.freeze]}
        if work.model.vision is not None and train.data.format == "vision":
            asked["images"] = FEATURES if work.conditions.features else PIXELS
        if execution.parallel != ONE_COPY:
            asked["parallel"] = plain(execution.parallel)
        asked["recompute"] = execution.recompute
    elif isinstance(work, InitWork):
        asked |= {"kind": START}
        if work.state:
            before = graph.stages[work.state].form
            assert isinstance(before, (TrainWork, InitWork))
            asked["carried"] = TEXT if before.model.vision is None else VISION
        device = "cpu"
    else:
        reads = SUITES.get(work.suite).reads if isinstance(work, EvaluateWork) else ("benchmarks",)
        asked |= {"kind": EVALUATION, "max_length": work.max_length, "precision": work.precision, "reads": list(reads)}
        asked["device"] = device
    moe = work.model.moe
    name = f"{moe.preset} {moe.top_k}/{moe.num_experts}+{moe.shared_experts}"
    return Shape(asked, work.model, vocabulary, resources, device, f"{name} {stage.phase}", train)


def _of_shape(model: Model) -> Model:
    """Return a model without what no byte depends on, such as which checkpoint it starts from."""
    moe = dataclasses.replace(model.moe, router_init_std=MoESpec().router_init_std)
    model = dataclasses.replace(model, moe=moe, init_std=0.02, rope_theta=10000.0, norm_eps=1e-5)
    start = "any" if model.checkpoint else ""
    vision = model.vision
    if vision is not None:
        first = "any" if vision.checkpoint else ""
        vision = dataclasses.replace(vision, checkpoint=first, checkpoint_digest="", init_std=0.02, norm_eps=1e-6)
    return dataclasses.replace(model, checkpoint=start, checkpoint_digest="", foreign_tokenizer=False, vision=vision)


def _of_memory(train: TrainSpec) -> TrainSpec:
    """Return a phase without what no byte depends on: of most numbers it counts whether they are 0."""
    neutral = TrainSpec(DataSpec("", format=train.data.format))
    kept = ("micro_batch", "accumulation", "sequence_length", "precision", "optimizer", "optimizer_parameters")
    return dataclasses.replace(
        neutral,
        **{name: getattr(train, name) for name in kept},
        freeze="",
        expert_dropout=0.5 if train.expert_dropout else 0.0,
        adapter=dataclasses.replace(train.adapter, alpha=1.0),
        balance=_some(train.balance),
    )


def _some(balance: BalanceSpec) -> BalanceSpec:
    """Return the losses with coefficients of 0 and 1: what a schedule begins or ends with takes no more."""
    return dataclasses.replace(
        balance,
        aux_coef=float(balance.aux_coef != 0),
        z_coef=float(balance.z_coef != 0),
        bias_rate=float(balance.bias_rate != 0),
        entropy_coef=float(balance.entropy_coef != 0),
        null_coef=float(balance.null_coef != 0),
        mutual_information_coef=float(balance.mutual_information_coef != 0),
        aux_schedule="constant",
        z_schedule="constant",
        aux_schedule_parameters=Parameters(),
        z_schedule_parameters=Parameters(),
    )


def digest_of(question: Question) -> str:
    """Return the name under which a question's answer is kept: other code of the nodes answers anew."""
    return hashlib.sha256(f"{_code()} {canonical_text(question)}".encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256(__version__.encode())
    for path in sorted((resources.ROOT / "jobs").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
