"""A state's weights: names in a fixed order, tied weights once, and their digest."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from jobs.models.shards import Rows, elements, tensors_digest
from jobs.moe.experts import Experts
from jobs.moe.lowrank import MARK
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name in a fixed order, tied weights once: a state's weights."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def load_canonical(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `canonical_state` back in, of sharded parameters this rank's rows; MoegridError when names differ.

    Adapters of the state are merged where the model has none. C2R's lists may be missing: those of a state from before
    fine-tuning limit nothing.
    """
    own, state = _matched(model, state)
    pieces = state_rows(model, own)
    with torch.no_grad():
        for name, piece in pieces.items():
            local = piece.tensor
            if name not in state:
                local.fill_(True)
            else:
                width = math.prod(piece.shape[1:])
                local.copy_(elements(state, name, piece.first * width, local.numel()).view(local.shape))


def load_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the buffers of a `canonical_state` back in, and no parameter; MoegridError when names differ."""
    parameters = {name for name, _ in model.named_parameters()}
    own, state = _matched(model, state)
    for name, tensor in own.items():
        if name not in parameters:
            tensor.copy_(state[name]) if name in state else tensor.fill_(True)


def _matched(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Return (the model's `canonical_state`, `state` with the same names); MoegridError when they differ."""
    own = canonical_state(model)
    if not any(MARK in name for name in own):
        state = merged(state)
    unlimited = {name for name in own if name.endswith(".router.allowed") and name not in state}
    if own.keys() - unlimited != set(state):
        difference = sorted(own.keys() ^ set(state))
        raise MoegridError(
            "these weights belong to another model", cause=f"differing names: {', '.join(difference[:8])}"
        )
    return own, state


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is one rank's share of a sharded one."""
    # Whoever has sharded it has imported what a process with whole tensors does without.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def state_rows(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Rows]:
    """Return what this rank holds of each tensor of a model's state: all rows, unless it is sharded or dealt."""
    dealt = {
        f"{path}.{leaf}": (module.group.first(module.num_experts), module.num_experts)
        for path, module in model.named_modules()
        if isinstance(module, Experts) and module.group is not None
        for leaf, _ in module.named_parameters(recurse=False)
    }
    pieces: dict[str, Rows] = {}
    for name, tensor in state.items():
        local, first, shape = tensor, 0, tuple(tensor.shape)
        if is_sharded(tensor):
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local, first = tensor.to_local(), offsets[0]
        if name in dealt:
            before, experts = dealt[name]
            first, shape = before + first, (experts, *shape[1:])
        pieces[name] = Rows(local, first, shape)
    return pieces


def materialise(
    model: nn.Module,
    state: Mapping[str, Tensor],
    device: str | torch.device = "cpu",
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> None:
    """Give the meta parameters of an `empty_model` memory on `device`, then read `state` one parameter at a time.

    `dtype_of` says by name in what type a parameter is kept. Raises MoegridError as `load_canonical` does.
    """
    replace_parameters(
        model, lambda name, old: nn.Parameter(torch.empty(old.shape, device=device, dtype=dtype_of(name)))
    )
    move_buffers(model, device)
    load_canonical(model, state)


def move_buffers(model: nn.Module, device: str | torch.device) -> None:
    """Put the buffers of a model whose parameters got their memory there on `device`."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def replace_parameters(model: nn.Module, fresh: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put `fresh(name, old)` in the place of every meta parameter; tied weights stay one."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                made[id(old)] = fresh(f"{prefix}.{leaf}" if prefix else leaf, old)
                made[id(old)].requires_grad_(old.requires_grad)
            module._parameters[leaf] = made[id(old)]


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of names, dtypes, shapes and bytes of `canonical_state`."""
    return tensors_digest(canonical_state(model))


def merged(state: Mapping[str, Tensor], begun: Mapping[str, Tensor] = MappingProxyType({})) -> Mapping[str, Tensor]:
    """Return a state's weights with its adapters added to the weights that they adapt, and `begun` adapters beside."""
    return _Merged(state, begun) if begun or any(MARK in name for name in state) else state


class _Merged(Mapping[str, Tensor]):
    """A view, so that no more than one weight is merged at a time."""

    def __init__(self, state: Mapping[str, Tensor], begun: Mapping[str, Tensor]) -> None:
        self._state, self._begun = state, begun
        self._names = [name for name in state if MARK not in name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._begun:
            return self._begun[name]
        weight = self._state[name]
        if f"{name}{MARK}A" not in self._state:
            return weight
        a, b, scale = (self._state[f"{name}{MARK}{part}"].float() for part in ("A", "B", "scale"))
        return (weight.float() + scale * (b @ a)).to(weight.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._begun or (name in self._state and MARK not in str(name))

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, *self._begun])

    def __len__(self) -> int:
        return len(self._names) + len(self._begun)
