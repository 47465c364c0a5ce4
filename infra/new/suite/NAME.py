"""The suite NAME. In a grid: `plugins: [./NAME.py]` and `evaluate: [lm, NAME]`.

Its parameter: `set: {evaluate.suite_parameters: {NAME: {power: 1}}}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moegrid.extend import SuiteKind

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Parameters:
    """What a grid may set of it; a value that differs from its default is in the keys."""

    power: float = 2.0


def measured(model: nn.Module, parameters: Parameters) -> dict[str, float]:
    """Return the metrics of a state: here the mean of |w|^power over all weights."""
    weights = [one.detach().double().abs() ** parameters.power for one in model.parameters()]
    return {"NAME_size": sum(one.sum().item() for one in weights) / sum(one.numel() for one in weights)}


def run(context: Any, work: Any, parameters: Parameters) -> None:
    """Measure the state that `work` names and commit what came out."""
    from moegrid.extend import load_state  # on nodes alone: it brings torch

    context.commit(work, blobs={}, metrics=measured(load_state(context, work).model, parameters))


KIND = SuiteKind(
    "NAME",
    code="NAME:run",
    reads=(),  # "text": held-out text, "tasks": items of evaluate.tasks
    settings=(),  # what else of the work it reads: "seed", "shots", ...
    columns=("NAME_size",),
    parameters=Parameters,
)
