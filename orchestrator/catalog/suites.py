"""Suites: what is measured on a state, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.catalog.benchmarks import BENCHMARKS, SAFETY, SAFETY_SETS
from orchestrator.catalog.lmms import LMMS_EVAL
from orchestrator.catalog.metrics import EFFICIENCY, LANGUAGE_MODEL
from orchestrator.registry import Registry

READS = ("text", "tasks", "benchmarks", "pictures", "shown")
# Fields of the work that a suite reads, beyond the state, texts and items; each enters the keys of those that do.
SETTINGS = ("seed", "shots", "limit", "routing_seeds", "metrics")


_WITH_BENCHMARKS = frozenset(name for one in BENCHMARKS.values() for name in (one.suite, *one.also) if name)


@dataclass(frozen=True, slots=True)
class Judging:
    """How a suite's responses are judged: its columns are `<prefix>_<what a judge gives>`, and `<prefix>_empty`.

    The judges are the grid's, or `judge` alone. With `sets` the mean of each set has the column `<set>_...` and their
    mean the one of the prefix; without, `columns` are all there are.
    """

    prefix: str
    judge: str = ""
    sets: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SuiteKind:
    """One suite of `evaluate`: a stage on each evaluated state.

    `code` is the dotted path of what runs it, (context: jobs.node.context.StageContext, work:
    orchestrator.spec.work.EvaluateWork[, parameters]) -> None: it loads the state (jobs.evaluate.state.load_state) and
    commits metrics and files (`context.commit`). With `ranked` every rank of a job runs it, else rank 0 alone.

    `reads` says what the work names: "text" (`tokens`: held-out text, `val_tokens` of it), "tasks" (`items`, `tasks`);
    `settings` which fields besides are set: `seed`, `shots`, `limit` (items a task), ... What is not read is in no key.
    `columns` are its metrics, `task_columns` those it makes for each task as `<task>/<name>`; metrics declared under
    these names say direction, range and description. `needs_tasks` refuses a grid without; `final` measures the last
    state of models with experts alone, `routed` every state of them: a dense model routes nothing. `parameters` is a
    frozen dataclass of scalars that a grid sets in `evaluate.suite_parameters`, None for none.

    Of ours: "pictures" are `evaluate.pictures`; "shown" names as `tokens` those of the last phase that shows pictures,
    with the questions that it held out; "benchmarks" are read from files or hubs of their own; `judged` says
    how responses are generated and judged; `contrasted` ones are changed by `dola`; `columns_by` is the dotted path
    of (evaluate) -> columns where these follow from its tasks; `arrays`: it leaves the arrays of routing that a
    report draws; `removes`: it takes experts away; `generates`: it takes tasks whose answers are generated as well;
    `protocol`: that of the sets of questions about pictures that it asks.
    """

    name: str
    code: str = ""
    reads: tuple[str, ...] = ("text",)
    settings: tuple[str, ...] = ("seed",)
    columns: tuple[str, ...] = ()
    task_columns: tuple[str, ...] = ()
    ranked: bool = False
    final: bool = False
    routed: bool = False
    needs_tasks: bool = False
    parameters: type | None = None
    judged: Judging | None = None
    contrasted: bool = False
    columns_by: str = ""
    arrays: bool = False
    removes: bool = False
    generates: bool = False
    protocol: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if not set(self.reads) <= set(READS) or not set(self.settings) <= set(SETTINGS):
            message = f"suite {self.name!r} reads some of {', '.join(READS)} and has settings of {', '.join(SETTINGS)}"
            raise ValueError(message)
        if ("benchmarks" in self.reads) != (self.name in _WITH_BENCHMARKS) or not (self.code or self.judged):
            raise ValueError(f"suite {self.name!r} needs code, and no benchmarks: those are of our suites")

    @property
    def how(self) -> str:
        """Why a grid gives one of ours no parameters."""
        return "its settings are fields of evaluate"


# What is measured where a grid does not say.
DEFAULT_SUITES = ("lm", "reasoning", "efficiency")

_JUDGED = ("benchmarks",)
# Refusals alone: of prompts that are safe, and of their unsafe counterparts.
_REFUSALS = Judging("xstest", "refusal_rate", columns=("xstest_safe_refusal", "xstest_unsafe_refusal"))
_BENCHMARKS = "jobs.evaluate.suites.benchmarks:run"
_OURS = (
    SuiteKind(
        "lm", "jobs.evaluate.suites.language_model:run", ("text",), (), columns=tuple(LANGUAGE_MODEL), ranked=True
    ),
    SuiteKind(
        "reasoning",
        "jobs.evaluate.suites.reasoning:run",
        ("tasks",),
        ("shots", "seed"),
        ranked=True,
        needs_tasks=True,
        columns_by="orchestrator.grid.columns:of_reasoning",
        generates=True,
    ),
    SuiteKind(
        "efficiency",
        "jobs.evaluate.suites.efficiency:run",
        ("tasks",),
        ("shots", "seed", "limit", "routing_seeds"),
        columns=tuple(EFFICIENCY),
        removes=True,
        ranked=True,
        final=True,
        needs_tasks=True,
    ),
    SuiteKind(
        "probe",
        "jobs.evaluate.suites.probe:run",
        ("text", "tasks"),
        ("seed", "limit", "metrics"),
        columns_by="orchestrator.grid.columns:of_probe",
        routed=True,
        arrays=True,
    ),
    SuiteKind(
        "seeing",
        "jobs.evaluate.suites.seeing:run",
        ("pictures",),
        (),
        columns_by="orchestrator.grid.columns:of_pictures",
        ranked=True,
    ),
    SuiteKind(
        "lmms_eval",
        "jobs.evaluate.suites.lmms_eval:run",
        ("pictures",),
        (),
        columns_by="orchestrator.grid.columns:of_lmms",
        ranked=True,
        protocol=LMMS_EVAL,
    ),
    SuiteKind(
        "seeing_probe",
        "jobs.evaluate.suites.seeing_probe:run",
        ("shown",),
        (),
        columns_by="orchestrator.grid.columns:of_seeing_probe",
        routed=True,
        arrays=True,
    ),
    SuiteKind("safety", reads=_JUDGED, judged=Judging(SAFETY, sets=tuple(SAFETY_SETS)), contrasted=True),
    SuiteKind("over_refusal", reads=_JUDGED, judged=_REFUSALS, contrasted=True),
    SuiteKind("hallucination", _BENCHMARKS, ("benchmarks",), ranked=True, contrasted=True),
    SuiteKind("adversarial", _BENCHMARKS, ("benchmarks",), ranked=True),
    SuiteKind("ood", _BENCHMARKS, ("benchmarks",), ranked=True),
    SuiteKind(
        "shifted_routing",
        "jobs.evaluate.suites.shifted_routing:run",
        ("benchmarks",),
        routed=True,
        columns_by="orchestrator.grid.columns:of_routing_shift",
    ),
)
SUITES = Registry("suites", "suite", SuiteKind, MappingProxyType({kind.name: kind for kind in _OURS}))
CONTRASTED = tuple(kind.name for kind in _OURS if kind.contrasted)


def kinds(names: Iterable[str]) -> tuple[SuiteKind, ...]:
    """Return the declarations of suites; MoegridError when nobody provides one."""
    return tuple(SUITES.get(name) for name in names)


def read(names: Iterable[str], what: str) -> bool:
    """Return whether one of the suites reads `what` ("text", "tasks", "benchmarks", "pictures")."""
    return any(what in kind.reads for kind in kinds(names))


def with_arrays(suite: str) -> bool:
    """Return whether a suite leaves the arrays of routing that a report draws."""
    kind = SUITES.builtins.get(suite)
    return kind is not None and kind.arrays
