"""The sections of a cell under some choices: factors set, derived fields filled in, checked and hashed - each once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, TypeVar

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import read
from orchestrator.catalog.tasks import task_kind
from orchestrator.data import local_data
from orchestrator.data.benchmark_files import read_benchmark
from orchestrator.data.checkpoints import completed, context_of, with_own_tokenizer
from orchestrator.data.hub_sets import benchmark_findings, items_findings, layout_findings
from orchestrator.data.local_data import told
from orchestrator.data.mixtures import mixture_shares
from orchestrator.data.pinning import pin, pin_checkpoint, pin_encoder
from orchestrator.data.tokenizers import pin_tokenizer
from orchestrator.errors import SourceError
from orchestrator.files.problems import Mistake
from orchestrator.grid.axes import Choice
from orchestrator.grid.declared import kept
from orchestrator.grid.factors import replace_path
from orchestrator.grid.phase_rules import Finding
from orchestrator.grid.validate import normal_train, section_findings
from orchestrator.spec.cell import (
    AdapterSpec,
    BalanceSpec,
    BenchmarkSpec,
    Cell,
    CorpusSpec,
    DataSpec,
    EvaluateSpec,
    JudgeSpec,
    MixSpec,
    PicturesSpec,
    StopSpec,
    TaskSpec,
    TokenizerSpec,
    TrainSpec,
)
from orchestrator.spec.content import anywhere, anywhere_data, anywhere_model, corpus_data, examples_of
from orchestrator.spec.fields import Path, fields_of
from orchestrator.spec.identity import digest
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.parameters import typed_parameters
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.rules import PHASES
from orchestrator.spec.units import Length

_Sourced = TypeVar("_Sourced", BenchmarkSpec, CorpusSpec, JudgeSpec, MixSpec, PicturesSpec, TaskSpec)

SECTIONS = tuple(fields_of(Cell))
SCIENCE = tuple(name for name in SECTIONS if name != "execution")
# Phases that are in a cell's identity where it has them alone.
NEW_PHASES = frozenset(field.name for field in dataclasses.fields(Cell) if field.metadata.get("neutral"))
_CHECKPOINT, _FOREIGN = ("model", "checkpoint"), ("model", "foreign_tokenizer")
_ACTIVE_WIDTH, _EXPERT_WIDTH = ("model", "active_width"), ("model", "moe", "expert_width")
_CONTEXT = ("model", "context")
_FROM_CHECKPOINT = ("model", "tokenizer", *PHASES, "evaluate")
_TOKENIZER_SIZE = ("tokenizer", "vocab_size")
_TOKENIZER = {("tokenizer", "kind"), ("tokenizer", "source")}


def sections_of(path: Path) -> tuple[str, ...]:
    """Return the sections that the field at `path` decides: a checkpoint brings its tokenizer and its context."""
    return _FROM_CHECKPOINT if path in (_CHECKPOINT, _FOREIGN) else path[:1]


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A finished section, the digest of its science, and what is wrong with it."""

    value: Any
    digest: str
    findings: tuple[Finding, ...]


class Sections:
    """Builds the sections of cells that start from `base`; equal choices give the same object.

    `lengths` are the phases whose steps are given in other units, `folder` is where relative files are sought, `said`
    are the fields that the grid itself sets: where a model starts from a checkpoint, that decides the others.
    """

    def __init__(
        self, base: Cell, lengths: Mapping[str, Length], folder: FilePath, said: frozenset[Path] = frozenset()
    ) -> None:
        self.base = base
        self.said = said | ({_EXPERT_WIDTH} if _ACTIVE_WIDTH in said else set())
        self.lengths = lengths
        self.folder = folder
        self._built: dict[str, dict[Any, Built]] = {name: {} for name in SECTIONS}
        self._pinned: dict[DataSpec, tuple[DataSpec, Mistake | None]] = {}
        self._readable: set[tuple[str, str]] = set()  # benchmarks and the digests of their files that were read
        self._looked_at: dict[DataSpec, list[tuple[Path, tuple[str, str]]]] = {}
        self._items_seen: dict[tuple[str, str, int], list[tuple[str, str]]] = {}
        self._epochs: dict[DataSpec, int] = {}

    def get(self, name: str, choices: Choice | tuple[Choice, ...] = ()) -> Built:
        """Return the section `name` with what `choices` set in it."""
        known = self._built[name].get(choices)
        if known is None:
            chosen = (choices,) if isinstance(choices, Choice) else choices
            known = self._build(name, chosen)
            # A checkpoint that changes nothing here gives the object that there is without it.
            own = tuple(choice for choice in chosen if any(path[0] == name for path, _ in choice.assignments))
            if len(own) < len(chosen):
                other = self.get(name, own[0] if len(own) == 1 else own)
                known = other if other.value == known.value else known
            self._built[name][choices] = known
        return known

    def _build(self, name: str, choices: tuple[Choice, ...]) -> Built:
        value = getattr(self.base, name)
        length = self.lengths.get(name)
        findings: list[Finding] = []
        changed: dict[str, object] = {}
        assigned = dict(assignment for choice in choices for assignment in choice.assignments)
        if (name,) in assigned:  # a phase that is left out
            value = None
        for path, new in assigned.items():
            if path[0] != name or path == (name,):
                continue
            if value is None:
                findings.append((path, f"the cell has no {name} phase", "choose another recipe or factor"))
                continue
            if isinstance(value, TrainSpec) and path[1:] == ("steps",):
                length = new if isinstance(new, Length) else None
            if isinstance(new, Length):
                continue
            if len(path) == 2:
                changed[path[1]] = new
            else:
                value = replace_path(value, path[1:], new)
        if changed:
            value = dataclasses.replace(value, **changed)
        value = self._from_checkpoint(name, value, assigned, findings)
        value = self._finish(name, value, length, findings)
        findings.extend(section_findings(name, value))
        return Built(value, digest(_science(value, not findings)), tuple(findings))

    def _from_checkpoint(self, name: str, value: Any, assigned: Mapping[Path, object], findings: list[Finding]) -> Any:
        """Return a section as the model's checkpoint wants it, where the grid itself does not say it."""
        said = {*self.said, *assigned}
        checkpoint = str(assigned.get(_CHECKPOINT, self.base.model.checkpoint))
        if not checkpoint:
            return value
        if isinstance(value, TokenizerSpec):
            if _TOKENIZER & said or assigned.get(_FOREIGN, self.base.model.foreign_tokenizer):
                return value
            return with_own_tokenizer(value, checkpoint, self.folder, sized=_TOKENIZER_SIZE in said)
        field = "sequence_length" if isinstance(value, TrainSpec) else "max_length"
        if isinstance(value, (TrainSpec, EvaluateSpec)) and (name, field) not in said and _CONTEXT not in said:
            # A default length gives way to a checkpoint of a shorter context.
            longest = context_of(checkpoint, self.folder)
            return dataclasses.replace(value, **{field: min(getattr(value, field), longest)}) if longest else value
        if not isinstance(value, ModelSpec):
            return value
        try:
            value = pin_checkpoint(value, self.folder)
        except Mistake as mistake:
            findings.append((_CHECKPOINT, mistake.message, mistake.hint))
            return value
        value, wrong = completed(value, {path[1:] for path in said if path[0] == "model"})
        findings += [(("model", *path), message, hint) for path, message, hint in wrong]
        return value

    def _finish(self, name: str, value: Any, length: Length | None, findings: list[Finding]) -> Any:
        """Fill in what is derived: steps from a length, digests of sources, the preset's values."""
        if isinstance(value, ModelSpec):
            try:
                if value.vision is not None:
                    value = dataclasses.replace(value, vision=pin_encoder(value.vision, self.folder))
            except Mistake as mistake:
                findings.append(((name, "vision", "checkpoint"), mistake.message, mistake.hint))
            try:
                return resolve_model(value)
            except ValueError:
                return value  # section_findings says why
        if isinstance(value, TokenizerSpec):
            try:
                value = pin_tokenizer(value, self.folder)
            except Mistake as mistake:
                findings.append(((name, "source"), mistake.message, mistake.hint))
            return value
        if isinstance(value, TrainSpec):
            value, wrong_parameters = typed_parameters(value)
            findings += [((name, *at), message, hint) for at, message, hint in wrong_parameters]
            data = self._data(value.data, (name, "data"), findings)
            for part, spec in self._parts(data):
                findings += [((name, "data", *part, at), wrong, hint) for at, wrong, hint in layout_findings(spec)]
            heads = self._heads(data)
            findings += [((name, "data", *part, "source"), *both) for part, both in heads]
            steps = value.steps
            if length is not None and not (heads and length.unit == "epochs"):
                try:
                    examples = self._examples(data, length) if length.unit == "epochs" else 0
                    steps = length.steps(value, examples)
                    data = dataclasses.replace(data, examples=examples)
                except Mistake as mistake:
                    findings.append(((name, "steps"), mistake.message, mistake.hint))
            balance, wrong_parameters = typed_parameters(value.balance)
            findings += [((name, "balance", *at), message, hint) for at, message, hint in wrong_parameters]
            if balance.losses:
                try:
                    uses = kept(fields_of(BalanceSpec)["losses"], balance.losses)
                    balance = dataclasses.replace(balance, losses=uses)
                except Mistake as mistake:
                    findings.append(((name, "balance", "losses"), mistake.message, mistake.hint))
            adapter = value.adapter if value.adapter.rank else AdapterSpec()
            stop = value.stop if value.stop.metric else StopSpec()
            if not value.trained:  # nothing else of it counts
                return TrainSpec(data, steps=0, sequence_length=value.sequence_length, trained=False)
            return dataclasses.replace(value, steps=steps, data=data, balance=balance, adapter=adapter, stop=stop)
        if isinstance(value, EvaluateSpec):
            items = DataSpec(source=value.source, format="items", digest=value.digest)
            pinned = self._pin(items, (name, "source"), findings)
            changed: dict[str, Any] = {"source": pinned.source, "digest": pinned.digest}
            for benchmark, given in value.benchmarks.items():
                if given.source:
                    at, wrong = (name, benchmark, "source"), list[Finding]()
                    changed[benchmark] = self._pinned_as("benchmark", given, at, wrong)
                    files = f"; {benchmark} is read from {BENCHMARKS[benchmark].files}"
                    findings += [(where, message, hint + files) for where, message, hint in wrong]
                    self._read(benchmark, changed[benchmark], at, findings)
                    findings += [(at, *both) for both in benchmark_findings(changed[benchmark].source, benchmark)]
            changed["tasks"] = tuple(
                self._pinned_as("benchmark", task, (name, "tasks", task.name, "source"), findings)
                if task.source
                else task
                for task in value.tasks
            )
            for task in changed["tasks"]:
                path: Path = (name, "tasks", task.name, "source")
                kind = task_kind(task.name)
                needed = kind.columns if kind is not None else ()
                findings += [(path, *both) for both in items_findings(task.source, task.name, needed)]
                if read(value.suites, "tasks"):
                    own = task.source or pinned.source
                    place: Path = path if task.source else (name, "source")
                    findings += [(place, *both) for both in self._items(own, task, task.digest or pinned.digest)]
            changed["pictures"] = tuple(
                self._pinned_as("items", one, (name, "pictures", one.name, "source"), findings)
                for one in value.pictures
            )
            judges = []
            for judge in value.judges:
                judge, wrong_parameters = typed_parameters(judge)
                findings += [((name, "judges", judge.name, *at), what, hint) for at, what, hint in wrong_parameters]
                if judge.source:
                    judge = self._pinned_as("judge", judge, (name, "judges", judge.name, "source"), findings)
                judges.append(judge)
            changed["judges"] = tuple(judges)
            for judge in changed["judges"]:
                where: Path = (name, "judges", judge.name, "source")
                findings += [(where, *both) for both in local_data.labels_findings(judge)]
            return dataclasses.replace(value, **changed)
        return value

    def _data(self, data: DataSpec, path: Path, findings: list[Finding]) -> DataSpec:
        """Return training data with everything that it is made of pinned; corpora take the place of its source."""
        if not data.corpora:
            for name in data.weights:
                findings.append(
                    ((*path, "weights", name), f"weight of {name!r}, which is no corpus", "set data.corpora")
                )
            pinned = self._pin(data, (*path, "source"), findings)
            return dataclasses.replace(pinned, mix=self._mix(data.mix, (*path, "mix", "source"), findings))
        try:
            shares = mixture_shares(data)
        except Mistake as mistake:
            findings.append(((*path, "weights"), mistake.message, mistake.hint))
            return data
        corpora = tuple(
            self._pinned_as(data.format, corpus, (*path, "corpora", corpus.name), findings) if corpus.source else corpus
            for corpus in sorted(data.corpora, key=lambda corpus: corpus.name)
            if corpus.name in shares
        )
        return DataSpec(
            "", data.format, holdout=data.holdout, mix=data.mix, corpora=corpora, weights=Parameters(shares)
        )

    @staticmethod
    def _parts(data: DataSpec) -> Iterator[tuple[Path, DataSpec]]:
        """Yield (where, data) of all that training data are made of."""
        if not data.corpora:
            yield (), data
        yield ("mix",), examples_of(data.mix)
        yield from ((("corpora", corpus.name), corpus_data(data, corpus)) for corpus in data.corpora)

    def _mix(self, mix: MixSpec, path: Path, findings: list[Finding]) -> MixSpec:
        """Return the mixed-in examples pinned; no rows of them are no mix, wherever they would come from."""
        if not mix.rows:
            return MixSpec()
        if not mix.source:
            findings.append((path, f"{mix.rows} rows are mixed in, but mix.source is not set", "name the data set"))
            return mix
        return self._pinned_as("instruction", mix, path, findings)

    def _pinned_as(self, form: str, spec: _Sourced, path: Path, findings: list[Finding]) -> _Sourced:
        """Return a spec that has a source, a revision and a digest with its source pinned."""
        data = DataSpec(source=spec.source, format=form, revision=spec.revision, digest=spec.digest)
        pinned = self._pin(data, path, findings)
        return dataclasses.replace(spec, source=pinned.source, revision=pinned.revision, digest=pinned.digest)

    def _read(self, name: str, spec: BenchmarkSpec, path: Path, findings: list[Finding]) -> None:
        """Read a user's file of a benchmark: what is wrong with it is said before anything is submitted."""
        if spec.source.startswith("file://") and spec.digest and (name, spec.digest) not in self._readable:
            try:
                read_benchmark(name, FilePath(spec.source.removeprefix("file://")))
                self._readable.add((name, spec.digest))
            except SourceError as error:
                findings.append((path, *told(error)))

    def _heads(self, data: DataSpec) -> list[tuple[Path, tuple[str, str]]]:
        """Return what is wrong with the heads of the files that training data come from, by part."""
        if data not in self._looked_at:
            own = [
                (part, both)
                for part, spec in self._parts(data)
                if part != ("mix",)
                for both in local_data.head_findings(spec)
            ]
            self._looked_at[data] = own + [(("mix",), both) for both in local_data.mix_findings(data)]
        return self._looked_at[data]

    def _items(self, source: str, task: TaskSpec, digest: str) -> list[tuple[str, str]]:
        """Return what is wrong with the items of a task in a file of this machine."""
        if not source.startswith("file://") or not digest:
            return []
        asked = (digest, task.name, task.shots)
        if asked not in self._items_seen:
            self._items_seen[asked] = list(local_data.items_findings(source, task))
        return self._items_seen[asked]

    def _examples(self, data: DataSpec, length: Length) -> int:
        """Return the examples of an epoch; Mistake that says which length asks for it."""
        if data not in self._epochs:
            try:
                self._epochs[data] = local_data.training_examples(data)
            except Mistake as mistake:
                raise Mistake(f"{length.text!r} {mistake.message}", mistake.hint) from None
            except (SourceError, OSError) as error:
                raise Mistake(*told(error)) from None
        return self._epochs[data]

    def _pin(self, data: DataSpec, path: Path, findings: list[Finding]) -> DataSpec:
        """Return `data` with the digest of its source; a problem with it goes to `findings`."""
        known = self._pinned.get(data)
        if known is None:
            try:
                known = pin(data, self.folder), None
            except Mistake as mistake:
                known = data, mistake
            self._pinned[data] = known
        pinned, wrong = known
        if wrong is not None:
            findings.append((path, wrong.message, wrong.hint))
        return pinned


def _science(value: object, sound: bool) -> Any:
    """Return what of a section defines a cell: training as what it does, without what is measured when."""
    if isinstance(value, TrainSpec) and sound:
        normal = normal_train(value)
        return dataclasses.replace(normal, data=anywhere_data(normal.data))
    if isinstance(value, ModelSpec):
        return anywhere_model(value)
    if isinstance(value, TokenizerSpec):
        return anywhere(value)
    if isinstance(value, EvaluateSpec):
        known: dict[str, Any] = {name: anywhere(given) for name, given in value.benchmarks.items()}
        known |= {name: tuple(map(anywhere, getattr(value, name))) for name in ("tasks", "judges")}
        return dataclasses.replace(value, at=(), suites=(), metrics={}, suite_parameters={}, **known)
    return value
