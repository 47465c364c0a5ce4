"""Why training stops for good: nothing is retried, the last good state stays, the cell is tagged."""

from __future__ import annotations

from orchestrator.errors import TrainingDiverged


class NotFinite(TrainingDiverged):
    """The loss or the gradient norm is NaN or infinite; the step was not applied."""

    failure_kind = "nan"


class Diverged(TrainingDiverged):
    """The loss is far above that of guessing every token with equal probability."""

    failure_kind = "diverged"


class RouterCollapsed(TrainingDiverged):
    """The router sends nearly every token to the same experts."""

    failure_kind = "router_collapsed"


class FrozenMoved(AssertionError):
    """A parameter changed in a phase that froze it."""
