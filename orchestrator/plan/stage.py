"""One stage of a grid, one wanted result, and the stages of one cell: a large grid holds a million of them."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec.forms import Form
from orchestrator.spec.work import EvaluateWork, JudgeWork, TrainWork, Work


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A unit of work with its key, the keys it needs, and the class of resources (`phase`) it runs under.

    `made`: its work, or the form that it shares with all stages which differ from it in `state` alone: the key of the
    training state (of a judge: of the responses) that it reads, "" if it reads none.
    """

    key: str
    kind: str
    phase: str  # prepare | pretrain | finetune | evaluate
    made: Work | Form
    parents: tuple[str, ...]
    label: str
    steps: int = 0
    state: str = ""

    @property
    def work(self) -> Work:
        """What the stage is asked to do; built anew each time where `made` is a form."""
        return self.made.filled(self.state) if isinstance(self.made, Form) else self.made

    @property
    def form(self) -> Work:
        """What the stage is asked to do, where the state it reads plays no part."""
        return self.made.work if isinstance(self.made, Form) else self.made

    @property
    def shown(self) -> int:
        """The held-out questions about pictures that the stage reads."""
        return self.made.shown if isinstance(self.made, Form) else 0

    @property
    def suite(self) -> str:
        """The suite that a stage's metrics belong to, else ""."""
        form = self.form
        return form.suite if isinstance(form, (EvaluateWork, JudgeWork)) else ""

    @property
    def alike(self) -> tuple[object, ...]:
        """Objects, compared by identity, that stages of equal cost have in common, and the number of steps."""
        if isinstance(self.made, TrainWork):
            return self.made.model, self.made.conditions.train, self.steps
        return (self.made,)


@dataclass(frozen=True, slots=True)
class Result:
    """One wanted result of a cell: a suite on the state at fraction `at` of its last phase."""

    key: str
    suite: str
    at: float
    step: int


@dataclass(frozen=True, slots=True)
class CellStages:
    """The stages of one cell in the order they are needed; `prepared` are the keys of those before any training."""

    stages: tuple[Stage, ...]
    final: str
    results: tuple[Result, ...]
    prepared: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple([stage.key for stage in self.stages])
