"""A rank without the others: torch's fake process group, tensors without values, and zeros where one looks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from jobs.models.backbones import CausalLM
from jobs.models.weights import canonical_state
from jobs.simulate.ledger import Ledger, following_resizes
from jobs.train.engines import fsdp, mesh


class _Zeros(TorchFunctionMode):
    """Gives zeros where a fake tensor would become an array."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one function of torch."""
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            kind = torch.zeros((), dtype=args[0].dtype, device="meta").dtype
            return np.zeros(tuple(args[0].shape), dtype=str(kind).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


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
    ledger = Ledger()

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
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(following_resizes(ledger))
        stack.enter_context(ledger)
        stack.enter_context(_Zeros())
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
