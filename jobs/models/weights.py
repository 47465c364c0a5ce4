"""A state's weights: names in a fixed order, tied weights once, and their digest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from jobs.models.shards import elements, tensors_digest
from orchestrator.errors import MoegridError


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

    C2R's lists may be missing: those of a state from before fine-tuning limit nothing.
    """
    own = canonical_state(model)
    unlimited = {name for name in own if name.endswith(".router.allowed") and name not in state}
    if own.keys() - unlimited != set(state):
        difference = sorted(own.keys() ^ set(state))
        raise MoegridError(
            "these weights belong to another model", cause=f"differing names: {', '.join(difference[:8])}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            local, first = own_rows(tensor)
            if name in unlimited:
                local.fill_(True)
            elif local is tensor:
                local.copy_(state[name])
            else:
                width = math.prod(tensor.shape[1:])
                local.copy_(elements(state, name, first * width, local.numel()).view(local.shape))


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return (the rows of `tensor` that this rank holds, the number of the first): all, unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offsets[0]


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
        model, lambda name, old: nn.Parameter(torch.empty_like(old, device=device, dtype=dtype_of(name)))
    )
    model.to(device)
    load_canonical(model, state)


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
