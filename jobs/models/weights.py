"""A state's weights: names in a fixed order, tied weights once, and their digest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jobs.models.shards import tensors_digest
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
    """Copy `canonical_state` back in; raises MoegridError when names differ.

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
            tensor.fill_(True) if name in unlimited else tensor.copy_(state[name])


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of names, dtypes, shapes and bytes of `canonical_state`."""
    return tensors_digest(canonical_state(model))
