"""An engine by its name."""

from __future__ import annotations

from jobs.models.backbones import CausalLM
from jobs.train.engine import Engine
from orchestrator.catalog.engines import ENGINES, REFUSED
from orchestrator.errors import MoegridError
from orchestrator.registry import load
from orchestrator.spec.cell import TrainSpec


def build_engine(name: str, model: CausalLM, train: TrainSpec, rank: int, world_size: int) -> Engine:
    """Return the engine `name` over `model`; MoegridError if it is not offered."""
    if name in REFUSED:
        raise MoegridError(f"engine {name!r} is not offered", cause=REFUSED[name], hint=", ".join(ENGINES.names()))
    engine: Engine = load(ENGINES.get(name).code, ENGINES.who(name))(model, train, rank, world_size)
    return engine
