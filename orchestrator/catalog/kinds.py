"""The kinds of stages: where each is implemented, and on what it runs."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.catalog.suites import SUITES


@dataclass(frozen=True, slots=True)
class StageKind:
    """Where a kind of stage is implemented; whether it computes with torch; whether every rank works on it.

    Where not, rank 0 does, alone.
    """

    module: str
    torch: bool = True
    ranked: bool = False


# Evaluations by suite. A module is imported when its stage runs: a data stage never loads torch.
STAGES: dict[str, StageKind] = {
    "data": StageKind("jobs.data.stage", torch=False),
    "tokenizer": StageKind("jobs.data.tokenizer", torch=False),
    "tokens": StageKind("jobs.data.tokens", torch=False),
    "features": StageKind("jobs.models.vision.features"),
    "init": StageKind("jobs.train.init"),
    "train": StageKind("jobs.train.stage", ranked=True),
    **{
        f"evaluate/{name}": StageKind(kind.code.partition(":")[0], ranked=kind.ranked)
        for name, kind in SUITES.builtins.items()
        if kind.code
    },
    "generate": StageKind("jobs.evaluate.judging.responses", ranked=True),
    "judge": StageKind("jobs.evaluate.judging.judges", ranked=True),
}


def computes(kind: str) -> bool:
    """Return whether a stage's kind of work (`train`, `evaluate`, ...) computes with torch."""
    return any(stage.torch for name, stage in STAGES.items() if name.partition("/")[0] == kind)
