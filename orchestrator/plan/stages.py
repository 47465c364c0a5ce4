"""A cell lowers to stages: data -> tokenizer -> tokens, init -> training segments -> evaluations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from orchestrator.spec.cell import Cell, DataSpec, EvaluateSpec, TrainSpec
from orchestrator.spec.identity import Span
from orchestrator.spec.schedule import freeze_phases, step_at
from orchestrator.spec.work import (
    Conditions,
    DataWork,
    EvaluateWork,
    InitWork,
    TokenizerWork,
    TokensWork,
    TrainWork,
    Work,
)

LANGUAGE_MODEL_SUITE = "lm"
EFFICIENCY_SUITE = "efficiency"


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
        """The key of the training state an evaluation reads, else ""."""
        return self.work.state if isinstance(self.work, EvaluateWork) else ""


@dataclass(frozen=True, slots=True)
class Result:
    """One wanted result of a cell: a suite on the state at fraction `at` of its last phase."""

    key: str
    suite: str
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class CellStages:
    """The stages of one cell in the order they are needed."""

    stages: tuple[Stage, ...]
    final: str
    results: tuple[Result, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(stage.key for stage in self.stages)


def conditions_of(train: TrainSpec, phase: str, frozen: str, tokens: str, seed: int) -> Conditions:
    """Return the normalised conditions: one frozen role, an absolute router learning rate."""
    router_lr = train.lr * train.router_lr_ratio if train.router_lr is None else train.router_lr
    normal = dataclasses.replace(train, freeze=frozen, router_lr=router_lr, router_lr_ratio=1.0)
    return Conditions(phase=phase, train=normal, tokens=tokens, seed=seed)


# A line of training: the initial artifact, the spans before, the conditions' digest and the step where they set in.
Line = tuple[str, tuple[Span, ...], str, int]


class Lowering:
    """Lowers cells; equal works are built once, so that ten thousand cells that share a base stay cheap.

    Lower every cell twice: the first pass gathers at which steps of a line some cell forks or wants a state, the second
    cuts all cells' runs there, so that a prefix is trained once whoever needs it.
    """

    def __init__(self) -> None:
        self._stages: dict[object, Stage] = {}
        self._digests: dict[Conditions, str] = {}
        self._cuts: dict[Line, set[int]] = {}

    def cell(self, cell: Cell, *, private: str = "") -> CellStages:
        """Return the stages of `cell`; with `private` its states are shared with no other cell."""
        stages: list[Stage] = []
        text = cell.pretrain or cell.finetune
        assert text is not None, "a cell trains in at least one phase"
        corpus = self._data(stages, text.data, cell.seed.data)
        if cell.tokenizer.kind == "pretrained":
            corpus_of_tokenizer = ""
        else:
            corpus_of_tokenizer = corpus
        tokenizer = self._add(stages, TokenizerWork(cell.tokenizer, corpus_of_tokenizer), "prepare", "tokenizer")
        init = self._add(
            stages, InitWork(cell.model, tokenizer, cell.seed.init, private), "prepare", f"init seed {cell.seed.init}"
        )
        history: tuple[Span, ...] = ()
        state = init
        states: dict[int, str] = {}
        phases = [("pretrain", cell.pretrain, cell.seed.pretrain), ("finetune", cell.finetune, cell.seed.finetune)]
        present = [(phase, train, seed) for phase, train, seed in phases if train is not None]
        tokens_of: dict[str, str] = {}
        for phase, train, seed in present:
            data = self._data(stages, train.data, cell.seed.data)
            length = train.sequence_length if train.data.format == "instruction" else 0
            tokens_of[phase] = self._add(
                stages,
                TokensWork(data, tokenizer, train.data.format, length),
                "prepare",
                f"tokens of {short_source(train.data.source)}",
            )
            last = phase == present[-1][0]
            wanted = {step_at(at, train.steps) for at in cell.evaluate.at} if last else set()
            states = {0: state}
            for span in freeze_phases(train.freeze, train.steps):
                conditions = conditions_of(train, phase, span.frozen, tokens_of[phase], seed)
                digest = self._digest(conditions)
                cuts = self._cuts.setdefault((init, history, digest, span.start), set())
                cuts.add(span.stop)
                cuts.update(step for step in wanted if span.start < step < span.stop)
                before = history
                start = span.start
                for stop in sorted(cut for cut in cuts if cut <= span.stop):
                    work = TrainWork(cell.model, tokenizer, init, before, conditions, start, stop)
                    state = self._segment(stages, work, state)
                    before = (*history, (digest, span.start, stop))
                    states[stop] = state
                    start = stop
                history = before
        results = self._evaluations(stages, cell, present[-1][1], states, tokenizer, tokens_of[present[0][0]])
        return CellStages(tuple(dict.fromkeys(stages)), state, results)

    def _evaluations(
        self,
        stages: list[Stage],
        cell: Cell,
        train: TrainSpec,
        states: dict[int, str],
        tokenizer: str,
        tokens: str,
    ) -> tuple[Result, ...]:
        evaluate = cell.evaluate
        results: list[Result] = []
        items = ""
        if any(suite != LANGUAGE_MODEL_SUITE for suite in evaluate.suites):
            source = DataSpec(source=evaluate.source, format="items", digest=evaluate.digest, holdout=0.0)
            names = tuple(sorted({task.name for task in evaluate.tasks}))
            items = self._add(stages, DataWork(source, 0, names), "prepare", "evaluation items")
        for at in sorted(evaluate.at):
            step = step_at(at, train.steps)
            for suite in evaluate.suites:
                if suite == EFFICIENCY_SUITE and step != train.steps:
                    continue
                work = evaluation(cell, suite, states[step], tokenizer, items, tokens)
                key = self._add(stages, work, "evaluate", f"{suite} at {at:g}")
                results.append(Result(key, suite, at, step))
        return tuple(results)

    def _data(self, stages: list[Stage], data: DataSpec, seed: int) -> str:
        return self._add(stages, DataWork(data, seed), "prepare", f"data {short_source(data.source)}")

    def _digest(self, conditions: Conditions) -> str:
        if conditions not in self._digests:
            self._digests[conditions] = conditions.digest()
        return self._digests[conditions]

    def _segment(self, stages: list[Stage], work: TrainWork, parent: str) -> str:
        conditions = work.conditions
        identity = ("train", parent, work.init, work.history, self._digest(conditions), work.start, work.stop)
        if identity not in self._stages:
            frozen = f" freeze {conditions.train.freeze}" if conditions.train.freeze else ""
            train = conditions.train
            ratio = f" router_lr {train.router_lr:g}" if train.router_lr != train.lr else ""
            self._stages[identity] = Stage(
                key=work.key(),
                kind=work.kind,
                phase=conditions.phase,
                work=work,
                parents=tuple(dict.fromkeys((parent, conditions.tokens, work.tokenizer))),
                label=f"{conditions.phase} {work.start}-{work.stop}{frozen}{ratio} seed {conditions.seed}",
                steps=work.stop - work.start,
            )
        stages.append(self._stages[identity])
        return self._stages[identity].key

    def _add(self, stages: list[Stage], work: Work, phase: str, label: str) -> str:
        if work not in self._stages:
            self._stages[work] = Stage(
                key=work.key(),
                kind=work.kind,
                phase=phase,
                work=work,
                parents=tuple(dict.fromkeys(work.parents.values())),
                label=label,
            )
        stages.append(self._stages[work])
        return self._stages[work].key


def evaluation(cell: Cell, suite: str, state: str, tokenizer: str, items: str, tokens: str) -> EvaluateWork:
    """Return the evaluation of one suite, with only the fields this suite reads set."""
    spec: EvaluateSpec = cell.evaluate
    common = EvaluateWork(
        suite=suite,
        state=state,
        model=cell.model,
        tokenizer=tokenizer,
        items="",
        tokens="",
        max_length=spec.max_length,
        precision=spec.precision,
    )
    if suite == LANGUAGE_MODEL_SUITE:
        return dataclasses.replace(common, tokens=tokens, val_tokens=spec.val_tokens)
    tasked = dataclasses.replace(common, items=items, tasks=spec.tasks, shots=spec.shots, seed=cell.seed.eval)
    if suite == EFFICIENCY_SUITE:
        return dataclasses.replace(tasked, limit=spec.efficiency_limit, routing_seeds=spec.routing_seeds)
    return tasked


def short_source(source: str) -> str:
    """Return the last part of a data source's name."""
    return source.rstrip("/").rsplit("/", 1)[-1] or source
