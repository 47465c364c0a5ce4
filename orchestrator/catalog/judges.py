"""Judges of generated responses, ours and those of other packages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry

SOURCES = ("", "model", "file")
MODERATION_MODEL = "omni-moderation-latest"
MODERATION_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class JudgeKind:
    """A judge of (prompt, response) pairs.

    `code` is the dotted path of what opens it: (judge: orchestrator.spec.cell.JudgeSpec, device: str, ranks: int[,
    parameters]) -> a function of a list of (prompt, response) that returns one score each, in `low`..`high`. It may
    have the attributes `template` (that it filled), `revision` and `model_served` (of a server), which results say, and
    `bounds` where its scores have others than declared. `ranks` processes judge side by side. `parameters` is a frozen
    dataclass of scalars, None for none.

    `source` is what `source` names in a grid: "model", "file", or "" where it has none. `templated` judges take
    `template` and `label`; `template` is their default. `key` is the variable of the environment that they need.
    `higher_is_safer` tells refusals from harm scores. `column` is what its columns are called, "" = its name (another
    package's leaves it so).
    """

    name: str
    code: str
    column: str = ""
    source: str = ""
    template: str = ""
    templated: bool = False
    higher_is_safer: bool = False
    low: float = 0.0
    high: float = 1.0
    key: str = ""
    parameters: type | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.source not in SOURCES or not self.low < self.high:
            raise ValueError(f"judge {self.name!r}: source is model, file or nothing, and low is below high")

    @property
    def shown(self) -> str:
        """What its columns are called, after the prompts'."""
        return self.column or self.name


_OURS = (
    JudgeKind(
        "reward_model",
        "jobs.evaluate.judging.judge_models:RewardModel",
        "reward",
        "model",
        "Human: {prompt}\n\nAssistant: {response}",
        templated=True,
        low=-math.inf,
        high=math.inf,
    ),
    JudgeKind("llama_guard", "jobs.evaluate.judging.judge_models:LlamaGuard", source="model", templated=True),
    JudgeKind(
        "openai_moderation",
        "jobs.evaluate.judging.moderation:Moderator",
        "openai",
        template="{response}",
        templated=True,
        key=MODERATION_KEY,
    ),
    JudgeKind("refusal_rate", "jobs.evaluate.judging.refusals:open_judge", "refusal", higher_is_safer=True),
    JudgeKind("labels", "jobs.evaluate.judging.judges:open_labels", source="file", low=-math.inf, high=math.inf),
)
JUDGES = Registry("judges", "judge", JudgeKind, MappingProxyType({kind.name: kind for kind in _OURS}))
