"""Operations on tensors without values, from memory: what an operation returned for equal shapes it returns again.

FakeTensorMode finds out anew, or in a slow cache of its own, what every operation returns. A model's layers and steps
repeat a few hundred of them thousands of times. Remembered are operations that return new tensors, views of an
argument, or the argument that they write to; every other is run, and so is one whose answer is of two arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

# Operations whose result depends on values, or that change what a tensor is.
_DIFFERENT = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view})
# Its result's shape depends on values where a mask chooses, and on shapes alone where numbers do.
_INDEX = torch.ops.aten.index.Tensor
_MASKS = (torch.bool, torch.uint8)
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that an operation returns: a view of tensor argument `of`, or with memory of its own (-1)."""

    shape: Shape
    stride: Shape
    offset: int
    dtype: torch.dtype
    device: torch.device
    of: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an operation returns: the tensor argument `same`, or `made` as a tensor or `several`; nothing without."""

    same: int = -1
    made: tuple[Made, ...] = ()
    several: Callable[[list[FakeTensor]], Sequence[FakeTensor]] | None = None

    @property
    def views(self) -> bool:
        """Whether some of it is a view."""
        return any(one.of >= 0 for one in self.made)


# What operations returned in this process, whatever was simulated.
_KNOWN: dict[Hashable, Recipe | None] = {}


class Replay:
    """What the operations of one FakeTensorMode return, by what they were given."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def __call__(self, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Return what an operation returns."""
        tensors: list[FakeTensor] = []
        parts: list[Hashable] = [func, torch.get_default_dtype()]
        if not _replayable(func) or not _added(parts, tensors, (*args, *kwargs.items())):
            return func(*args, **kwargs)
        if func is _INDEX and any(tensor.dtype in _MASKS for tensor in tensors[1:]):
            return func(*args, **kwargs)
        key = tuple(parts)
        recipe = _KNOWN.get(key)
        # In inference mode a view is of the kind of what it views, which what is made here is not.
        if recipe is not None and not (recipe.views and torch.is_inference_mode_enabled()):
            return self._made(recipe, tensors)
        shapes = [tensor.shape for tensor in tensors]
        result: object = func(*args, **kwargs)
        if key not in _KNOWN:
            resized = any(tensor.shape != shape for tensor, shape in zip(tensors, shapes, strict=True))
            _KNOWN[key] = None if resized else _recipe(tensors, result)
        return result

    def _made(self, recipe: Recipe, tensors: Sequence[FakeTensor]) -> object:
        if recipe.same >= 0:
            return tensors[recipe.same]
        metas: list[Tensor] = []
        with in_kernel_invocation_manager(self._mode):
            for one in recipe.made:
                if one.of < 0:
                    metas.append(torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta"))
                else:
                    storage = tensors[one.of].untyped_storage()
                    meta = torch.empty_strided((0,), (1,), dtype=one.dtype, device="meta")
                    metas.append(meta.set_(storage, one.offset, one.shape, one.stride))
        found = [FakeTensor(self._mode, meta, one.device) for meta, one in zip(metas, recipe.made, strict=True)]
        if recipe.several is not None:
            return recipe.several(found)
        return found[0] if found else None


def _added(parts: list[Hashable], tensors: list[FakeTensor], values: Iterable[object]) -> bool:
    """Add what decides an operation's result to `parts`; False when something else than shapes and numbers does."""
    for value in values:
        kind = type(value)
        if isinstance(value, FakeTensor):
            if value.constant is not None:
                return False
            tensors.append(value)
            parts += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _added(parts, tensors, value):
                return False
        elif kind in _PLAIN:
            parts += (kind, value)  # type: ignore[arg-type]
        else:
            return False
    return True


def _recipe(tensors: Sequence[FakeTensor], result: object) -> Recipe | None:
    """Return how a result is made again from tensor arguments of the same shapes, None if it is not known how."""
    if result is None:
        return Recipe()
    same = [place for place, tensor in enumerate(tensors) if tensor is result]
    if same:
        return Recipe(same[0]) if len(same) == 1 else None
    several: Callable[[list[FakeTensor]], Sequence[FakeTensor]] | None = None
    outputs: Sequence[object] = [result]
    if isinstance(result, (list, tuple)):
        several, outputs = (tuple if isinstance(result, tuple) else list), result
    places: dict[int, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.untyped_storage()._cdata, []).append(place)
    made: list[Made] = []
    fresh: set[int] = set()
    for output in outputs:
        if not isinstance(output, FakeTensor) or output.constant is not None or output.layout is not torch.strided:
            return None
        storage, offset = output.untyped_storage(), int(output.storage_offset())
        viewed = places.get(storage._cdata, [])
        if len(viewed) > 1:
            return None
        of = viewed[0] if viewed else -1
        if of < 0 and (storage._cdata in fresh or offset or storage.nbytes() != _bytes(output)):
            return None
        fresh.add(storage._cdata)
        size, stride = tuple(output.shape), tuple(output.stride())
        made.append(Made(size, stride, offset, output.dtype, output.fake_device, of))
    return Recipe(made=tuple(made), several=several)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor's elements span."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@cache
def _replayable(func: OpOverload) -> bool:
    """Return whether an operation may be remembered: it writes nothing, or the one argument that it returns."""
    if func.namespace != "aten" or (_DIFFERENT & set(func.tags) and func is not _INDEX):
        return False
    aliases = [argument.alias_info for argument in func._schema.arguments]
    written = sum(alias is not None and alias.is_write for alias in aliases)
    return not written or (written == 1 and len(func._schema.returns) <= 1)
