"""Suites: what is measured on a state, ours and those of other packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.catalog.benchmarks import BENCHMARKS
from orchestrator.registry import Registry

READS = ("text", "tasks", "benchmarks")
# Fields of the work that a suite reads, beyond the state, texts and items; each enters the keys of those that do.
SETTINGS = ("seed", "shots", "limit", "routing_seeds", "metrics")


_WITH_BENCHMARKS = frozenset(one.suite for one in BENCHMARKS.values() if one.suite)


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

    Of ours: "benchmarks" are read from files or hubs of their own; `judged` suites have responses generated and
    judged; `contrasted` ones are changed by `dola`.
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
    judged: bool = False
    contrasted: bool = False
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


_JUDGED = ("benchmarks",)
_BENCHMARKS = "jobs.evaluate.suites.benchmarks:run"
_OURS = (
    SuiteKind("lm", "jobs.evaluate.suites.language_model:run", ("text",), (), ranked=True),
    SuiteKind(
        "reasoning", "jobs.evaluate.suites.reasoning:run", ("tasks",), ("shots", "seed"), ranked=True, needs_tasks=True
    ),
    SuiteKind(
        "efficiency",
        "jobs.evaluate.suites.efficiency:run",
        ("tasks",),
        ("shots", "seed", "limit", "routing_seeds"),
        ranked=True,
        final=True,
        needs_tasks=True,
    ),
    SuiteKind("probe", "jobs.evaluate.suites.probe:run", ("text", "tasks"), ("seed", "limit", "metrics"), routed=True),
    SuiteKind("safety", reads=_JUDGED, judged=True, contrasted=True),
    SuiteKind("over_refusal", reads=_JUDGED, judged=True, contrasted=True),
    SuiteKind("hallucination", _BENCHMARKS, ("benchmarks",), ranked=True, contrasted=True),
    SuiteKind("adversarial", _BENCHMARKS, ("benchmarks",), ranked=True),
    SuiteKind("ood", _BENCHMARKS, ("benchmarks",), ranked=True),
)
SUITES = Registry("suites", "suite", SuiteKind, MappingProxyType({kind.name: kind for kind in _OURS}))
CONTRASTED = tuple(kind.name for kind in _OURS if kind.contrasted)


def kinds(names: Iterable[str]) -> tuple[SuiteKind, ...]:
    """Return the declarations of suites; MoegridError when nobody provides one."""
    return tuple(SUITES.get(name) for name in names)


def read(names: Iterable[str], what: str) -> bool:
    """Return whether one of the suites reads `what` ("text", "tasks", "benchmarks")."""
    return any(what in kind.reads for kind in kinds(names))
