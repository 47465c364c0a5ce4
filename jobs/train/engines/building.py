"""An engine by its name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.weights import materialise
from jobs.train.engine import Engine
from orchestrator.catalog.engines import ENGINES, REFUSED
from orchestrator.errors import MoegridError
from orchestrator.registry import load
from orchestrator.spec.cell import ONE_COPY, Parallel, TrainSpec


def build_engine(
    name: str,
    model: CausalLM,
    train: TrainSpec,
    rank: int,
    world_size: int,
    weights: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    parallel: Parallel = ONE_COPY,
) -> Engine:
    """Return the engine `name` over `model`; MoegridError if it is not offered.

    With `weights` the model is an `empty_model`: what this rank needs of them is read onto `device`. `parallel` is how
    an engine that can do so lays out the ranks.
    """
    if name in REFUSED:
        raise MoegridError(f"engine {name!r} is not offered", cause=REFUSED[name], hint=", ".join(ENGINES.names()))
    kind = ENGINES.get(name)
    build = load(kind.code, ENGINES.who(name))
    if kind.reads_weights:
        assert weights is not None, "the engine reads its weights"
        more = (parallel,) if kind.meshes else ()
        engine: Engine = build(model, train, rank, world_size, weights, device, *more)
        return engine
    if weights is not None:
        materialise(model, weights, device)
    whole: Engine = build(model, train, rank, world_size)
    return whole
