"""A cell lowers to stages: data -> tokenizer -> tokens, init -> training segments -> evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.suites import SUITES, read
from orchestrator.catalog.tasks import TASKS
from orchestrator.plan.evaluations import (
    MEASURING,
    benchmark_works,
    evaluation,
)
from orchestrator.spec.cell import Cell, DataSpec, TaskSpec, TrainSpec
from orchestrator.spec.identity import Span, state_key
from orchestrator.spec.model import Model
from orchestrator.spec.schedule import Phase, freeze_phases, step_at
from orchestrator.spec.suites import Use, uses
from orchestrator.spec.work import (
    Conditions,
    DataWork,
    EvaluateWork,
    GenerateWork,
    InitWork,
    JudgeWork,
    TaskSource,
    TokenizerWork,
    TokensWork,
    TrainWork,
    Work,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A unit of work with its key, the keys it needs, and the class of resources (`phase`) it runs under."""

    key: str
    kind: str
    phase: str  # prepare | pretrain | finetune | evaluate
    work: Work
    parents: tuple[str, ...]
    label: str
    steps: int = 0

    @property
    def state(self) -> str:
        """The key of the training state (of a judge: of the responses) that an evaluation reads, else ""."""
        if isinstance(self.work, JudgeWork):
            return self.work.responses
        return self.work.state if isinstance(self.work, (EvaluateWork, GenerateWork)) else ""

    @property
    def suite(self) -> str:
        """The suite that a stage's metrics belong to, else ""."""
        return self.work.suite if isinstance(self.work, (EvaluateWork, JudgeWork)) else ""


@dataclass(frozen=True, slots=True)
class Result:
    """One wanted result of a cell: a suite on the state at fraction `at` of its last phase."""

    key: str
    suite: str
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class CellStages:
    """The stages of one cell in the order they are needed; `prepared` are the keys of those before any training."""

    stages: tuple[Stage, ...]
    final: str
    results: tuple[Result, ...]
    prepared: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(stage.key for stage in self.stages)


def constant_part(train: TrainSpec, frozen: str) -> TrainSpec:
    """Return what holds while `frozen` is frozen: an absolute router learning rate (none while it is frozen)."""
    router_lr = train.lr * train.router_lr_ratio if train.router_lr is None else train.router_lr
    if frozen == "router":
        router_lr = train.lr
    data = DataSpec(source="", format=train.data.format, holdout=0.0, examples=train.data.examples)
    return dataclasses.replace(train, freeze=frozen, router_lr=router_lr, router_lr_ratio=1.0, data=data)


def before_finetuning(model: Model) -> Model:
    """Return the model that the initial weights and pretraining belong to: C2R's limit is not there yet.

    So a model with the limit shares them with the one without. A preset that needs it is never without.
    """
    if not model.moe.collaboration_top or "collaboration_top" in kind_of(model.moe).needs:
        return model
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, collaboration_top=0))


# A line of training: the initial artifact, the spans before, the conditions' digest and the step where they set in.
Line = tuple[str, tuple[Span, ...], str, int]


@dataclass(frozen=True, slots=True)
class _Base:
    """What the cells of equal sections have in common before training."""

    stages: tuple[Stage, ...]
    tokenizer: str
    init: str
    tokens: Mapping[str, str]  # phase -> key of its tokens
    items: str
    benchmarks: Mapping[tuple[str, str], tuple[Use, str, str]]  # (suite, benchmark) -> use, its items, clean items
    prepared: tuple[str, ...]


class Lowering:
    """Lowers cells; equal works are built once, so that ten thousand cells that share a base stay cheap.

    First `gather` every cell: that notes at which steps of a line some cell forks or wants a state. Then `cell` cuts
    all cells' runs there, so that a prefix is trained once whoever needs it. Sections of cells are recognised by
    object: a grid builds each once.
    """

    def __init__(self) -> None:
        self._stages: dict[object, Stage] = {}
        self._bases: dict[object, _Base] = {}
        self._spans: dict[object, tuple[tuple[Phase, Conditions, str], ...]] = {}
        self._constant: dict[tuple[int, str], TrainSpec] = {}
        self._cuts: dict[Line, set[int]] = {}
        self._suites: dict[object, list[Stage]] = {}

    def gather(self, cell: Cell, *, private: str = "") -> None:
        """Note where `cell` needs its training cut."""
        base = self._base(cell, private)
        history: tuple[Span, ...] = ()
        for phase, train, seed, last in phases_of(cell):
            wanted = [step_at(at, train.steps) for at in cell.evaluate.at] if last else []
            for span, _, digest in self._spans_of(cell, phase, train, seed, base):
                cuts = self._cuts.setdefault((base.init, history, digest, span.start), set())
                cuts.add(span.stop)
                cuts.update([step for step in wanted if span.start < step < span.stop])
                history = (*history, (digest, span.start, span.stop))

    def cell(self, cell: Cell, *, private: str = "") -> CellStages:
        """Return the stages of `cell`; with `private` its states are shared with no other cell."""
        base = self._base(cell, private)
        stages = list(base.stages)
        history: tuple[Span, ...] = ()
        state = base.init
        states: dict[int, str] = {}
        train = None
        for phase, train, seed, _ in phases_of(cell):
            states = {0: state}
            for span, conditions, digest in self._spans_of(cell, phase, train, seed, base):
                before, start = history, span.start
                for stop in sorted(self._cuts[base.init, history, digest, span.start]):
                    if stop > span.stop:
                        break
                    after = (*history, (digest, span.start, stop))
                    stage = self._segment(cell, base, state, before, after, conditions, digest, start, stop)
                    stages.append(stage)
                    state = states[stop] = stage.key
                    before, start = after, stop
                history = before
        assert train is not None, "a cell trains in at least one phase"
        results = self._evaluations(stages, cell, train, states, base)
        return CellStages(tuple(stages), state, results, base.prepared)

    def _base(self, cell: Cell, private: str) -> _Base:
        seed = cell.seed
        identity = (
            id(cell.model),
            id(cell.tokenizer),
            id(cell.pretrain),
            id(cell.finetune and cell.finetune.data),
            cell.finetune and cell.finetune.sequence_length,
            id(cell.evaluate),
            seed.data,
            seed.init,
            private,
        )
        if identity not in self._bases:
            self._bases[identity] = self._build_base(cell, private)
        return self._bases[identity]

    def _build_base(self, cell: Cell, private: str) -> _Base:
        stages: list[Stage] = []
        text = cell.pretrain or cell.finetune
        assert text is not None, "a cell trains in at least one phase"
        corpus = self._data(stages, text.data, cell.seed.data)
        source = "" if cell.tokenizer.kind == "pretrained" else corpus
        tokenizer = self._add(stages, TokenizerWork(cell.tokenizer, source), "prepare", "tokenizer")
        work = InitWork(before_finetuning(cell.model), tokenizer, cell.seed.init, private)
        init = self._add(stages, work, "prepare", f"init seed {cell.seed.init}")
        tokens = {}
        for phase, train, _, _ in phases_of(cell):
            data = self._data(stages, train.data, cell.seed.data)
            length = train.sequence_length if train.data.format == "instruction" else 0
            label = f"tokens of {short_source(train.data.source)}"
            tokens[phase] = self._add(stages, TokensWork(data, tokenizer, train.data.format, length), "prepare", label)
        items = ""
        evaluate = cell.evaluate
        if read(evaluate.suites, "tasks"):
            spec = DataSpec(source=evaluate.source, format="items", digest=evaluate.digest, holdout=0.0)
            names = tuple(sorted({task.name for task in evaluate.tasks}))
            apart = tuple(
                TaskSource(task.name, DataSpec(task.source, format="items", revision=task.revision, digest=task.digest))
                for task in sorted(evaluate.tasks, key=lambda task: task.name)
                if task.source
            )
            wheel = evaluate.source.startswith("wheel://")
            drawn = {task.name for task in evaluate.tasks if wheel and task.shots and not task.source}
            pools = tuple(sorted(name for name in drawn if TASKS.get(name).pooled))
            items = self._add(stages, DataWork(spec, 0, names, apart, pools), "prepare", "evaluation items")
        benchmarks = {}
        for suite in evaluate.suites:
            for use in uses(evaluate, suite):
                own = self._items(stages, use.name, use.data, use.tasks if use.clean_data else (*use.tasks, *use.clean))
                clean = self._items(stages, use.name, use.clean_data, use.clean) if use.clean_data else ""
                benchmarks[suite, use.name] = (use, own, clean)
        prepared = tuple(dict.fromkeys(stage.key for stage in stages))
        return _Base(tuple(dict.fromkeys(stages)), tokenizer, init, tokens, items, benchmarks, prepared)

    def _items(self, stages: list[Stage], name: str, data: DataSpec, tasks: Sequence[TaskSpec]) -> str:
        work = DataWork(data, 0, tuple(task.name for task in tasks))
        return self._add(stages, work, "prepare", f"items of {name}")

    def _spans_of(
        self, cell: Cell, phase: str, train: TrainSpec, seed: int, base: _Base
    ) -> tuple[tuple[Phase, Conditions, str], ...]:
        """Return (freeze phase, conditions, their digest) of one training phase."""
        tokens, limit = base.tokens[phase], cell.model.moe.collaboration_top if phase == "finetune" else 0
        identity = (phase, id(train), seed, tokens, limit)
        if identity not in self._spans:
            spans = []
            for span in freeze_phases(train.freeze, train.steps):
                # One object for all seeds: its canonical text is written once.
                constant = self._constant.get((id(train), span.frozen))
                if constant is None:
                    constant = self._constant[id(train), span.frozen] = constant_part(train, span.frozen)
                conditions = Conditions(phase, constant, tokens, seed, limit)
                spans.append((span, conditions, conditions.digest()))
            self._spans[identity] = tuple(spans)
        return self._spans[identity]

    def _evaluations(
        self, stages: list[Stage], cell: Cell, train: TrainSpec, states: Mapping[int, str], base: _Base
    ) -> tuple[Result, ...]:
        evaluate = cell.evaluate
        tokens = next(iter(base.tokens.values()))
        results: list[Result] = []
        for at in sorted(evaluate.at):
            step = step_at(at, train.steps)
            for suite in evaluate.suites:
                # A dense model routes nothing; interventions are measured on the final state alone.
                kind = SUITES.get(suite)
                if kind.final and (step != train.steps or not kind_of(cell.model.moe).routes):
                    continue
                identity = ("evaluate", suite, states[step], id(evaluate), id(cell.model), cell.seed.eval)
                if identity not in self._suites:
                    if "benchmarks" not in kind.reads:
                        work = evaluation(cell, suite, states[step], base.tokenizer, base.items, tokens)
                        made = [self._stage(work, "evaluate", f"{suite} at {at:g}", work.key())]
                    else:
                        made = list(self._benchmarks(cell, suite, states[step], base, at))
                    self._suites[identity] = made
                for stage in self._suites[identity]:
                    stages.append(stage)
                    if stage.kind in MEASURING:
                        results.append(Result(stage.key, suite, at, step))
        return tuple(results)

    def _benchmarks(self, cell: Cell, suite: str, state: str, base: _Base, at: float) -> Iterator[Stage]:
        """Yield the stages of a suite of benchmarks: one each, or responses and a stage a judge."""
        for (of, _), (use, items, clean) in base.benchmarks.items():
            if of != suite:
                continue
            for work, label in benchmark_works(cell, suite, use, state, base.tokenizer, items, clean):
                yield self._stage(work, "evaluate", f"{label} at {at:g}", work.key())

    def _data(self, stages: list[Stage], data: DataSpec, seed: int) -> str:
        return self._add(stages, DataWork(data, seed), "prepare", f"data {short_source(data.source)}")

    def _segment(
        self,
        cell: Cell,
        base: _Base,
        parent: str,
        before: tuple[Span, ...],
        after: tuple[Span, ...],
        conditions: Conditions,
        digest: str,
        start: int,
        stop: int,
    ) -> Stage:
        identity = (base.init, before, digest, start, stop)
        if identity not in self._stages:
            key = state_key(base.init, after)
            model = cell.model if conditions.phase == "finetune" else before_finetuning(cell.model)
            work = TrainWork(model, base.tokenizer, base.init, before, conditions, start, stop)
            train = conditions.train
            frozen = f" freeze {train.freeze}" if train.freeze else ""
            ratio = f" router_lr {train.router_lr:g}" if train.router_lr != train.lr else ""
            self._stages[identity] = Stage(
                key=key,
                kind=work.kind,
                phase=conditions.phase,
                work=work,
                parents=tuple(dict.fromkeys((parent, conditions.tokens, base.tokenizer))),
                label=f"{conditions.phase} {start}-{stop}{frozen}{ratio} seed {conditions.seed}",
                steps=stop - start,
            )
        return self._stages[identity]

    def _add(self, stages: list[Stage], work: Work, phase: str, label: str) -> str:
        key = work.key()
        if key not in self._stages:
            self._stages[key] = self._stage(work, phase, label, key)
        stages.append(self._stages[key])
        return key

    @staticmethod
    def _stage(work: Work, phase: str, label: str, key: str) -> Stage:
        return Stage(key, work.kind, phase, work, tuple(dict.fromkeys(work.parents.values())), label)


def phases_of(cell: Cell) -> list[tuple[str, TrainSpec, int, bool]]:
    """Return (phase, spec, seed, is the last one) of the phases in which `cell` trains."""
    both = [("pretrain", cell.pretrain, cell.seed.pretrain), ("finetune", cell.finetune, cell.seed.finetune)]
    present = [(phase, train, seed) for phase, train, seed in both if train is not None]
    return [(phase, train, seed, i == len(present) - 1) for i, (phase, train, seed) in enumerate(present)]


def short_source(source: str) -> str:
    """Return the last part of a data source's name."""
    return source.rstrip("/").rsplit("/", 1)[-1] or source
