"""What a run without values would hold and do: bytes by kind over time, products, bytes moved, collectives.

A `Ledger` sees every operation of FakeTensorMode, or of a real run on a CPU. An allocation's kind may be set later
(a gradient is known as one when backward has put it there): peaks are computed afterwards, from the list of events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from weakref import finalize

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.simulate.products import products

KINDS = ("weights", "gradients", "optimizer", "activations", "buffers", "communication", "host")
# In host memory, whatever the device.
HOST = "host"
# Ranges that FSDP2 announces to profilers: what is allocated in them holds gathered weights or gradients on their way.
COMMUNICATING = ("FSDP::",)
_ENTER, _EXIT = "profiler::_record_function_enter_new", "profiler::_record_function_exit"
_LOOK = "aten::_local_scalar_dense"
_DEVICE = torch.ops.prim.device.default

# What runs an operation.
Call = Callable[[OpOverload, Sequence[object], Mapping[str, object]], object]


def _run(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    result: object = func(*args, **kwargs)
    return result


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that were held at one time, by kind, without those of the host."""

    total: int
    kinds: Mapping[str, int]
    host: int  # the most of the host, which may be at another time


@dataclass(frozen=True, slots=True)
class Operation:
    """What a kind of operation does: FLOPs of its products, bytes read and written, in which type it computes."""

    flops: int
    bytes: int
    dtype: str


class Ledger(TorchDispatchMode):
    """Notes allocations, operations and collectives while it is entered.

    `truth` is what a look at a fake truth value gives, other fake values are 0, and a fake mask has `chosen` true
    entries.
    """

    def __init__(self, call: Call = _run) -> None:
        """Watch operations, each of which `call` runs."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call
        self.truth = False
        self.chosen = 0
        self.kind = "activations"
        self.operations: Counter[Operation] = Counter()
        self.collectives: Counter[tuple[str, int]] = Counter()  # (name, bytes of this rank's whole buffer) -> calls
        self.looks = 0
        self._kinds: list[str] = []  # of each allocation
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # (allocation, change of its bytes)
        self._live: dict[int, int] = {}  # storage -> allocation
        self._ranges: list[str] = []

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Give what is allocated meanwhile this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def mark(self) -> int:
        """Return a point in time, for `peak`."""
        return len(self._events)

    def name(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Give the allocations behind tensors a kind."""
        for tensor in tensors:
            if tensor is not None:
                self._kinds[self._known(tensor)] = kind

    def peak(self, start: int = 0, end: int | None = None) -> Peak:
        """Return the peak between two marks, with what was held at the first."""
        held: Counter[str] = Counter()
        for allocation, change in self._events[:start]:
            held[self._kinds[allocation]] += change
        host, most_host, total = held[HOST], held[HOST], sum(held.values()) - held[HOST]
        most, at = total, start
        for number, (allocation, change) in enumerate(self._events[start:end], start):
            if self._kinds[allocation] == HOST:
                host += change
                most_host = max(most_host, host)
                continue
            total += change
            if total > most:
                most, at = total, number + 1
        for allocation, change in self._events[start:at]:
            held[self._kinds[allocation]] += change
        kinds = {kind: held[kind] for kind in KINDS if held[kind] and kind != HOST}
        return Peak(most, kinds, most_host)

    def forget_operations(self) -> None:
        """Count operations and collectives from here on."""
        self.operations.clear()
        self.collectives.clear()
        self.looks = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run one operation and note what it did."""
        if func is _DEVICE and _fake(args[0]):  # asked before every operation
            return args[0].fake_device  # type: ignore[attr-defined]
        name = func._schema.name
        if name.startswith("prim::"):
            return func(*args, **(kwargs or {}))
        if _is_composite(func):  # in inference mode they come whole
            with self:
                parts: object = func.decompose(*args, **(kwargs or {}))
            return parts
        if name == _LOOK and _fake(args[0]):
            self.looks += 1
            return _zero(args[0], self.truth)
        if name in (_ENTER, _EXIT):
            if name == _ENTER:
                self._ranges.append(str(args[0]))
            elif self._ranges:
                self._ranges.pop()
            with torch._C._DisableTorchDispatch():  # of no tensor
                return func(*args)
        mask = _mask(args) if name == "aten::index" else None
        result = self._call(func, args, kwargs or {}) if mask is None else self._masked(args[0], mask)
        outputs: list[Tensor] = []
        if not _is_view(func):
            outputs = [tensor for tensor in _tensors(result) if not tensor.is_meta]
            for tensor in outputs:
                self._known(tensor)
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._collective(name.partition("::")[2], args)
        elif outputs and name.startswith(("aten::", "fsdp::")):
            inputs = _tensors((args, kwargs))
            moved = sum(_bytes(tensor) for tensor in (*inputs, *outputs))
            self.operations[Operation(products(name, args, outputs), moved, str(outputs[0].dtype))] += 1
        return result

    def _masked(self, tensor: object, mask: Tensor) -> Tensor:
        """Return what a fake mask chooses of a tensor."""
        assert isinstance(tensor, Tensor)
        return tensor.new_empty((self.chosen, *tensor.shape[mask.dim() :]))

    def _known(self, tensor: Tensor) -> int:
        """Return the allocation behind a tensor, noted now if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            communicating = any(name.startswith(COMMUNICATING) for name in self._ranges)
            self._live[key] = allocation = len(self._sizes)
            self._kinds.append("communication" if communicating and self.kind != HOST else self.kind)
            self._sizes.append(0)
            self._change(allocation, storage.nbytes())
            finalize(storage, self._freed, key)
        return self._live[key]

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note the new size of a storage, which FSDP2 frees and takes again without an operation."""
        if storage._cdata in self._live:
            allocation = self._live[storage._cdata]
            self._change(allocation, storage.nbytes() - self._sizes[allocation])

    def _change(self, allocation: int, change: int) -> None:
        if change:
            self._sizes[allocation] += change
            self._events.append((allocation, change))

    def _freed(self, key: int) -> None:
        allocation = self._live.pop(key)
        self._change(allocation, -self._sizes[allocation])

    def _collective(self, name: str, args: Sequence[object]) -> None:
        """Count a collective by the bytes of its whole buffer: what all ranks together gather, or what is reduced."""
        tensors = list(_tensors(args))
        if tensors:
            self.collectives[name.strip("_"), max(_bytes(tensor) for tensor in tensors)] += 1


@contextmanager
def following_resizes(ledger: Ledger) -> Iterator[None]:
    """Tell a ledger of storages whose size is changed directly."""
    resize: Callable[[torch.UntypedStorage, int], object] = torch.UntypedStorage.resize_

    def told(storage: torch.UntypedStorage, size: int) -> object:
        result = resize(storage, size)
        ledger.resized(storage)
        return result

    torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]


def _fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def _mask(args: Sequence[object]) -> Tensor | None:
    """Return the fake mask that alone indexes a tensor, if it is one."""
    indices = args[1]
    assert isinstance(indices, Sequence)
    mask = indices[0] if len(indices) == 1 else None
    return mask if isinstance(mask, Tensor) and _fake(mask) and mask.dtype is torch.bool else None


def _zero(value: object, truth: bool) -> float | int | bool:
    """Return what a look at a fake value gives."""
    assert isinstance(value, Tensor)
    if value.dtype is torch.bool:
        return truth
    return 0.0 if value.is_floating_point() else 0


@cache
def _is_composite(func: OpOverload) -> bool:
    """Return whether an operation is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _is_view(func: OpOverload) -> bool:
    """Return whether the result is another view of an argument."""
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, of a broadcast one those that exist."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()
