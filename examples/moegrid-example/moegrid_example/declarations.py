"""What this package declares: plain data, without torch, so that planning stays light."""

from __future__ import annotations

from dataclasses import dataclass

from moegrid.extend import (
    BackendKind,
    FreezeRule,
    LossKind,
    MetricKind,
    OptimizerKind,
    RouterKind,
    TaskKind,
    TrackerKind,
)


@dataclass(frozen=True)
class Scaled:
    """Parameters of the router; a value that differs from its default is in the keys of what uses it."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale:g}")


SCALED = RouterKind(
    "scaled",
    code="moegrid_example.router:Scaled",
    parameters=Scaled,
    # A row and a scale for each expert, of every layer: plan and model must agree to the last one.
    parameter_count=lambda moe, hidden_size: moe.num_experts * (hidden_size + 1),
)


@dataclass(frozen=True)
class Evenness:
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ValueError(f"power must be at least 1, not {self.power:g}")


EVENNESS = LossKind(
    "evenness",
    code="moegrid_example.loss:evenness",
    parameters=Evenness,
    description="mean |N P_i - 1|^power over the experts",
)


@dataclass(frozen=True)
class SureTokens:
    threshold: float = 0.5


SURE_TOKENS = MetricKind(
    "sure_tokens",
    code="moegrid_example.metric:sure_tokens",
    parameters=SureTokens,
    low=0.0,
    high=1.0,
    description="share of tokens whose router is sure",
)

RIDDLES = TaskKind(
    "riddles",
    shots=1,
    columns=("question", "options", "right"),
    splits=("validation", "train"),  # the one that is evaluated, then that of the shots
    source="moegrid_example:items",
    check="moegrid_example.task:check",
    config={  # as lm-eval's task files
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "training_split": "train",
        "doc_to_text": "Riddle: {{question}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
)


@dataclass(frozen=True)
class Lion:
    fast: float = 0.9
    slow: float = 0.99


LION = OptimizerKind("lion", code="moegrid_example.optimizer:lion", parameters=Lion, slots=("momentum",))

LOWER_HALF = FreezeRule("lower_half", code="moegrid_example.freeze:lower_half")

LINES = TrackerKind("lines", code="moegrid_example.tracker:Lines")

PROCESSES = BackendKind(
    "processes",
    settings="moegrid_example.backend:ProcessesSite",
    code="moegrid_example.backend:open_site",
    lists="moegrid_example/backend.py lists the settings: slots, folder",
)
