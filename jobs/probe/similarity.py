"""How alike a model's experts are: pairwise cosines of their weights, and of their outputs on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.probe.metrics import Floats, in_range
from jobs.probe.sets import TokenBatch, routings_of

if TYPE_CHECKING:
    from jobs.models.backbones import CausalLM
    from jobs.moe.block import MoEBlock

SIMILARITY_TOKENS = 2048
SIMILARITY_CHUNK = 128


@torch.inference_mode()
def weight_similarity(model: CausalLM) -> Floats:
    """Return the pairwise cosines [L,N,N] of each layer's flattened expert weights."""
    layers = []
    for block in model.moe_blocks:
        gram = sum(_gram(parameter) for parameter in block.experts.parameters())
        assert isinstance(gram, Tensor)
        layers.append(_cosines(gram))
    return np.stack(layers)


@torch.inference_mode()
def output_similarity(model: CausalLM, batches: Iterable[TokenBatch], tokens: int = SIMILARITY_TOKENS) -> Floats:
    """Return the pairwise cosines [L,N,N] of the experts' outputs, mean over at most `tokens` tokens.

    An output is what is weighed and summed: in the latent space, where the experts have one. Every expert runs on every
    token, so this is what a probe pays most for.
    """
    blocks = model.moe_blocks
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [block.register_forward_pre_hook(_keeper(kept, tokens)) for block, kept in zip(blocks, inputs, strict=True)]
    try:
        taken = 0
        for batch in batches:
            if taken >= tokens:
                break
            routings_of(model, batch)
            taken += batch.ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for block, kept in zip(blocks, inputs, strict=True):
        x_TD = block.expert_rows(torch.cat(kept)[:tokens] * block.router.input_scale)
        total = torch.zeros(block.moe.num_experts, block.moe.num_experts, dtype=torch.float64)
        for part in x_TD.split(SIMILARITY_CHUNK):
            outputs = torch.stack([_one_expert(block, part, e) for e in range(block.moe.num_experts)])
            unit = torch.nn.functional.normalize(outputs.double(), dim=-1)
            total += torch.einsum("ntd,mtd->nm", unit, unit).cpu()
        layers.append((total / len(x_TD)).clamp(-1.0, 1.0).numpy())
    return np.stack(layers)


def off_diagonal(cosines_LNN: Floats) -> float:
    """Return the mean over layers of the mean cosine of different experts, -1..1; 1 expert has none: 0."""
    n = cosines_LNN.shape[1]
    if n < 2:
        return 0.0
    sums = cosines_LNN.sum(axis=(1, 2)) - np.trace(cosines_LNN, axis1=1, axis2=2)
    return in_range("expert_similarity", float((sums / (n * (n - 1))).mean()), -1.0, 1.0)


def _keeper(kept: list[Tensor], tokens: int) -> Any:
    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if sum(len(part) for part in kept) < tokens:
            kept.append(arguments[0].detach().flatten(0, -2))

    return keep


def _one_expert(block: MoEBlock, x_TD: Tensor, expert: int) -> Tensor:
    chosen = torch.full((len(x_TD), 1), expert, dtype=torch.long, device=x_TD.device)
    ones = torch.ones(len(x_TD), 1, device=x_TD.device)
    output: Tensor = block.experts(x_TD, chosen, ones, after=block.after_experts)
    return output


def _gram(parameter: Tensor) -> Tensor:
    flat = parameter.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(65536, dim=1):
        wide = part.double()
        total += (wide @ wide.T).cpu()
    return total


def _cosines(gram: Tensor) -> Floats:
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    found: Floats = (gram * scale[:, None] * scale[None, :]).clamp(-1.0, 1.0).numpy()
    return found
