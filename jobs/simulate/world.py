"""A rank without the others: torch's fake process group, tensors without values, and zeros where one looks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from jobs.models.backbones import CausalLM
from jobs.models.weights import canonical_state
from jobs.simulate.ledger import Ledger, following_resizes
from jobs.simulate.replay import Replay
from jobs.train.engines import fsdp, mesh


@contextmanager
def _zeros() -> Iterator[None]:
    """Give zeros meanwhile where a fake tensor would become an array."""
    real = Tensor.numpy

    def array(tensor: Tensor, *, force: bool = False) -> NDArray[np.generic]:
        if not isinstance(tensor, FakeTensor):
            return real(tensor, force=force)
        return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    Tensor.numpy = array  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del Tensor.numpy  # the real one is a base class's


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def simulated(ranks: int) -> Iterator[Ledger]:
    """Be rank 0 of `ranks`; tensors that are made meanwhile have shapes and no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(Replay(mode))

    def seeing(real: Callable[..., object]) -> Callable[..., object]:
        def seen(*args: object, **kwargs: object) -> object:
            with _disable_current_modes():  # a mesh counts its ranks with tensors
                return real(*args, **kwargs)

        return seen

    with ExitStack() as stack:
        if ranks > 1:
            stack.enter_context(_variable("LOCAL_RANK", "0"))  # DeepSpeed asks for it
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        for module, real in ((device_mesh, device_mesh.init_device_mesh), (fsdp, mesh.lay_out)):
            setattr(module, real.__name__, seeing(real))
            stack.callback(setattr, module, real.__name__, real)
        stack.enter_context(mode)
        stack.enter_context(following_resizes(ledger))
        stack.enter_context(ledger)
        stack.enter_context(_zeros())
        yield ledger


class Weights(Mapping[str, Tensor]):
    """The weights of a state by name: shapes that take no memory."""

    def __init__(self, model: CausalLM) -> None:
        self._shapes = {name: (tuple(t.shape), t.dtype) for name, t in canonical_state(model).items()}

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        return torch.empty([1] * len(shape), dtype=dtype).expand(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
