"""Decoding by contrasting layers (DoLa, Chuang et al. 2024): what the last layer adds to an earlier one.

At every position the earlier layer is the candidate whose next-token distribution is farthest (in Jensen-Shannon
divergence) from the last layer's. The score of a token is its log-probability in the last layer minus that in the
earlier one, normalised by a softmax. In generation only tokens with at least `ALPHA` times the largest probability of
the last layer take part; in scoring all do, as in the authors' evaluation. Early states go to the head without the
final norm, as in the authors' implementation; what a model multiplies embeddings and logits with, it does here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.spec.attention import MultiplierSpec

ALPHA = 0.1
# Positions whose distributions are held at once: several copies over the whole vocabulary.
POSITIONS = 256


class Contrast:
    """Contrasts a causal LM's last layer with `layers` (0 = the embeddings); `alpha` 0 keeps every token."""

    def __init__(self, module: nn.Module, layers: Sequence[int], alpha: float = 0.0) -> None:
        whole: Any = getattr(module, "backbone", module)
        self._sources: list[nn.Module] = [
            whole.model.layers[layer - 1] if layer else whole.model.embed_tokens for layer in layers
        ]
        self._head: nn.Module = whole.lm_head
        self._alpha = alpha
        factors = getattr(getattr(module, "spec", None), "multipliers", MultiplierSpec())
        self._scales = [(1.0 if layer else factors.embedding) / factors.logits for layer in layers]

    @contextmanager
    def watching(self, keep_BS: Tensor) -> Iterator[list[Tensor]]:
        """Collect the candidates' hidden states [n,D] at the positions of `keep_BS` during a forward pass."""
        states: list[Tensor] = [torch.empty(0)] * len(self._sources)

        def note(number: int, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[number] = hidden[keep_BS]

        handles = [
            source.register_forward_hook(lambda _, __, output, number=number: note(number, output))
            for number, source in enumerate(self._sources)
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, last_nV: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Return the contrasted log-probabilities [n,V] in fp32."""
        weight: Any = self._head.weight
        found = [last_nV[:0].float()]
        for at in range(0, len(last_nV), POSITIONS):
            part = slice(at, at + POSITIONS)
            early = [
                nn.functional.linear(state[part], weight).float() * scale
                for state, scale in zip(states, self._scales, strict=True)
            ]
            found.append(contrasted(last_nV[part].float(), early, self._alpha))
        return torch.cat(found)


def contrasted(last_nV: Tensor, early: Sequence[Tensor], alpha: float) -> Tensor:
    """Return log softmax(log p - log q) [n,V] of last logits against each position's farthest early ones."""
    log_p = last_nV.log_softmax(-1)
    farthest = torch.full_like(log_p[:, 0], -math.inf)
    log_q = torch.zeros_like(log_p)
    for logits_nV in early:
        candidate = logits_nV.log_softmax(-1)
        distance = jensen_shannon(log_p, candidate)
        nearer = distance > farthest
        farthest = torch.where(nearer, distance, farthest)
        log_q = torch.where(nearer[:, None], candidate, log_q)
    difference = log_p - log_q
    if alpha > 0:
        least = log_p.max(-1, keepdim=True).values + math.log(alpha)
        difference = difference.masked_fill(log_p < least, -math.inf)
    return difference.log_softmax(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in nats of two log-distributions over the last dimension."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))
