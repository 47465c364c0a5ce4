"""Trackers: where runs are shown, by the scheme of `--tracking`. MLflow's schemes and plain paths are MLflow's.

Another package's tracker is named by its scheme (`wall://HOST/PATH`) or by its name alone (`wall`). `code` is a
function `connect(uri) -> Tracker` (orchestrator.tracking.tracker has the protocol); it runs where the driver runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

MLFLOW = "mlflow"
# As MLflow names its backend stores, without a driver (`postgresql+psycopg2`); "" is a path.
_MLFLOW_SCHEMES = frozenset(
    {"", "http", "https", "file", "sqlite", "mysql", "mssql", "postgresql", "databricks", "databricks-uc", "uc"}
)


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """One tracker: the function that connects to it, and the module that it needs ("" = none beyond its package)."""

    name: str
    code: str
    needs: str = ""


BUILTINS: Mapping[str, TrackerKind] = MappingProxyType(
    {
        MLFLOW: TrackerKind(MLFLOW, "orchestrator.tracking.mlflow:MlflowTracker", needs="mlflow"),
        "tensorboard": TrackerKind(
            "tensorboard", "orchestrator.tracking.tensorboard:TensorBoardTracker", needs="tensorboardX"
        ),
        "wandb": TrackerKind("wandb", "orchestrator.tracking.wandb:WandbTracker", needs="wandb"),
    }
)
TRACKERS = Registry(
    "trackers", "tracker", TrackerKind, BUILTINS, "", "it is opened by its name, without a grid, to sync and to show"
)


def full_uri(given: str) -> str:
    """Return a tracker's URI: the name of another package's tracker becomes its scheme."""
    plain = given.replace("_", "").replace("-", "").isalnum()
    if not plain or given in _MLFLOW_SCHEMES or Path(given).exists():
        return given
    if TRACKERS.find(given) is not None:
        return f"{given}://"
    if near := TRACKERS.near(given):
        raise MoegridError(f"tracker {given!r} is unknown", hint=f"{near[:-1]}, or write ./{given} for a folder?")
    return given


def tracker_of(uri: str) -> TrackerKind:
    """Return the kind of a tracker by its URI's scheme; MoegridError with the nearest names when nobody has it."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    return TRACKERS.get(MLFLOW if scheme.partition("+")[0] in _MLFLOW_SCHEMES else scheme)
