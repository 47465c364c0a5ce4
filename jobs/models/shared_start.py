"""A model that is drawn at random but for its shared experts, which a pretrained dense model's feed-forward fills.

LibMoE, section 5a (SharedE-Upcyc V2): does a router settle sooner beside shared experts that know their task already?
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from jobs.models.backbones import CausalLM
from jobs.models.building import empty_model
from jobs.models.convert import PublicWeights
from jobs.models.sources import open_checkpoint
from jobs.models.weights import canonical_state
from orchestrator.errors import MoegridError
from orchestrator.spec.public_config import spec_of

SHARED, DENSE = ".shared.", ".ffn."


def with_shared(model: CausalLM, weights: Iterator[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights`, those of shared experts taken from the same layer of the dense checkpoint at `source`.

    Wider experts repeat its hidden units, narrower ones have the first. Raises MoegridError when it does not fit.
    """
    checkpoint = open_checkpoint(source)
    dense = empty_model(spec_of(checkpoint.config), int(checkpoint.config["vocab_size"]))
    theirs = PublicWeights(checkpoint, canonical_state(dense), dense.spec)
    own, its = model.spec, dense.spec
    if own.hidden_size != its.hidden_size or own.num_layers > its.num_layers:
        raise MoegridError(
            f"the feed-forward of {checkpoint.name} does not fit the shared experts",
            cause=f"it has {its.num_layers} layers of width {its.hidden_size}, the model {own.num_layers} of "
            f"{own.hidden_size}",
            hint="set model.hidden_size to its width, and model.num_layers to no more than its layers",
        )
    for name, tensor in weights:
        if SHARED not in name:
            yield name, tensor
            continue
        taken = theirs[name.replace(SHARED, DENSE)]
        across = int(name.endswith(".down"))
        units = torch.arange(tensor.shape[across]) % taken.shape[across]
        yield name, taken.index_select(across, units).to(tensor.dtype)
