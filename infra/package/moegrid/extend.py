"""What a plugin file or a package of your own imports: the kinds that it declares, what their code builds on, helpers.

Declarations are read by the control plane, which has no torch: what `CODE` names is imported where it is used, so that
a plan stays light. In a process that imports this module, a test of yours say, the names `jobs` and `orchestrator` mean
moegrid's parts.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moegrid._home import enter

enter(first=True)

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.evaluate.results import Mean as Mean
    from jobs.evaluate.results import Table as Table
    from jobs.evaluate.state import load_state as load_state
    from jobs.evaluate.suites.tasks import score_tasks as score_tasks
    from jobs.moe import Routing as Routing
    from jobs.moe import build_block as build_block
    from jobs.moe.routers import Context as Context
    from jobs.moe.routers import Router as Router
    from orchestrator.backends.base import Batch as Batch
    from orchestrator.backends.base import Handle as Handle
    from orchestrator.backends.base import JobState as JobState
    from orchestrator.backends.base import node_command as node_command
    from orchestrator.backends.base import node_environment as node_environment
    from orchestrator.catalog.backends import BackendKind as BackendKind
    from orchestrator.catalog.encoders import EncoderKind as EncoderKind
    from orchestrator.catalog.engines import EngineKind as EngineKind
    from orchestrator.catalog.experts import ExpertKind as ExpertKind
    from orchestrator.catalog.frames import FrameKind as FrameKind
    from orchestrator.catalog.freezing import FreezeRule as FreezeRule
    from orchestrator.catalog.gates import GateKind as GateKind
    from orchestrator.catalog.judges import JudgeKind as JudgeKind
    from orchestrator.catalog.losses import LossKind as LossKind
    from orchestrator.catalog.metrics import MetricKind as MetricKind
    from orchestrator.catalog.optimizers import OptimizerKind as OptimizerKind
    from orchestrator.catalog.overflows import OverflowKind as OverflowKind
    from orchestrator.catalog.routers import RouterKind as RouterKind
    from orchestrator.catalog.schedules import ScheduleKind as ScheduleKind
    from orchestrator.catalog.scores import ScoreKind as ScoreKind
    from orchestrator.catalog.selections import SelectionKind as SelectionKind
    from orchestrator.catalog.sources import SourceKind as SourceKind
    from orchestrator.catalog.stores import StoreKind as StoreKind
    from orchestrator.catalog.suites import SuiteKind as SuiteKind
    from orchestrator.catalog.tasks import TaskKind as TaskKind
    from orchestrator.catalog.trackers import TrackerKind as TrackerKind
    from orchestrator.errors import MoegridError as MoegridError
    from orchestrator.resources import GridFolder as GridFolder
    from orchestrator.tracking.tracker import KEY_TAG as KEY_TAG
    from orchestrator.tracking.tracker import Recorded as Recorded

# What declares a name, for the control plane.
KINDS = {
    "BackendKind": "orchestrator.catalog.backends",
    "ChatTemplate": "orchestrator.catalog.templates",
    "EncoderKind": "orchestrator.catalog.encoders",
    "EngineKind": "orchestrator.catalog.engines",
    "ExpertKind": "orchestrator.catalog.experts",
    "FrameKind": "orchestrator.catalog.frames",
    "FreezeRule": "orchestrator.catalog.freezing",
    "GateKind": "orchestrator.catalog.gates",
    "GridFolder": "orchestrator.resources",
    "JudgeKind": "orchestrator.catalog.judges",
    "LossKind": "orchestrator.catalog.losses",
    "MetricKind": "orchestrator.catalog.metrics",
    "OptimizerKind": "orchestrator.catalog.optimizers",
    "OverflowKind": "orchestrator.catalog.overflows",
    "RouterKind": "orchestrator.catalog.routers",
    "ScheduleKind": "orchestrator.catalog.schedules",
    "ScoreKind": "orchestrator.catalog.scores",
    "SelectionKind": "orchestrator.catalog.selections",
    "SourceKind": "orchestrator.catalog.sources",
    "StoreKind": "orchestrator.catalog.stores",
    "SuiteKind": "orchestrator.catalog.suites",
    "TaskKind": "orchestrator.catalog.tasks",
    "TrackerKind": "orchestrator.catalog.trackers",
}
# What their code builds on: of nodes, with torch; of backends and trackers, where the driver runs.
CODE = {
    "KEY_TAG": "orchestrator.tracking.tracker",
    "Batch": "orchestrator.backends.base",
    "Context": "jobs.moe.routers",
    "Handle": "orchestrator.backends.base",
    "JobState": "orchestrator.backends.base",
    "Mean": "jobs.evaluate.results",
    "MoegridError": "orchestrator.errors",
    "Recorded": "orchestrator.tracking.tracker",
    "Router": "jobs.moe.routers",
    "Routing": "jobs.moe",
    "Table": "jobs.evaluate.results",
    "build_block": "jobs.moe",
    "load_state": "jobs.evaluate.state",
    "node_command": "orchestrator.backends.base",
    "node_environment": "orchestrator.backends.base",
    "score_tasks": "jobs.evaluate.suites.tasks",
}


def __getattr__(name: str) -> Any:
    module = KINDS.get(name) or CODE.get(name)
    if module is None:
        raise AttributeError(f"module 'moegrid.extend' has no attribute {name!r}; it has {', '.join(__dir__())}")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "jobs":
            raise
        raise ImportError(f"another package named jobs was imported before moegrid.extend: {error}") from error


def __dir__() -> list[str]:
    return sorted([*KINDS, *CODE, "code_of", "load_plugin", "prompts_of", "routing_of"])


def load_plugin(path: str | Path) -> dict[str, Any]:
    """Read a plugin file or folder as a grid does; return its declarations by "WORD NAME" ("loss tilt").

    Raises MoegridError when it cannot be imported, declares nothing, or a name of it is taken.
    """
    from orchestrator import plugins, registry

    names = plugins.register(plugins.read_plugin(Path(path).resolve()))
    return {named: registry.declaration(named) for named in names}


def code_of(declaration: Any, field: str = "code") -> Any:
    """Return what a path of a declaration names, as a node imports it."""
    from orchestrator.registry import load

    return load(getattr(declaration, field), repr(declaration.name))


def prompts_of(task: Any, items: str | Path, shots: int = 0) -> list[list[tuple[str, str]]]:
    """Return for each item of a task, from `items`/<task>/<split>.jsonl, the pairs (text, answer) that are scored."""
    from jobs.evaluate.harness import Prepared
    from orchestrator.spec.cell import TaskSpec

    def encode(pairs: Any) -> list[tuple[list[int], list[int]]]:
        return [([0], [0]) for _ in pairs]

    spec = TaskSpec(task.name, shots=shots, metric=task.metric)
    prepared = Prepared(spec, Path(items), limit=0, seed=0, shared=False, max_length=512, encode=encode)
    return [list(item.requests) for item in prepared.items]


def routing_of(logits_TN: Tensor, top_k: int = 2) -> Routing:
    """Return what a plain softmax router decides from logits [T,N], to try losses and metrics on."""
    import torch

    from jobs.moe.routing import Routing
    from jobs.moe.selection import count

    scores = torch.softmax(logits_TN.float(), dim=-1)
    weights, indices = scores.topk(top_k, dim=-1)
    mask = torch.ones(len(logits_TN), dtype=torch.bool)
    experts = logits_TN.shape[1]
    return Routing(logits_TN, scores, indices, weights, mask, count(indices, experts), 1, top_k, experts)
