"""Token sets for probes: windows of a stream, or sequences of differing lengths, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from jobs.data.spans import Spans
    from jobs.models.backbones import CausalLM, Output
    from jobs.moe.routing import Routing

TOKENS_A_BATCH = 4096


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One batch of a token set: ids [B,S], mask [B,S] (1 = real), spans [B,S] for word and sentence routers.

    `images` [B,H,W,3] are the pictures of a model that sees, one a row.
    """

    ids: Tensor
    mask: Tensor
    spans: Tensor | None
    images: Tensor | None = None


def routings_of(model: CausalLM, batch: TokenBatch) -> tuple[Routing, ...]:
    """Return the routing records of one batch."""
    mask = None if bool(batch.mask.all()) else batch.mask
    images = {} if batch.images is None else {"images": batch.images}
    output: Output = model(batch.ids, attention_mask=mask, spans=batch.spans, logits_to_keep=1, **images)
    return output.routings


def text_batches(
    tokens: NDArray[Any], length: int, limit: int, seed: int, spans: Spans | None, device: str
) -> Iterator[TokenBatch]:
    """Yield windows of a token stream, drawn without repetition by `seed`, at most `limit` tokens (0 = all)."""
    windows = max(1, len(tokens) // length)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(windows)
    if limit:
        order = order[: max(1, limit // length)]
    rows = max(1, TOKENS_A_BATCH // length)
    for start in range(0, len(order), rows):
        chosen = [
            np.asarray(tokens[w * length : (w + 1) * length], dtype=np.int64) for w in order[start : start + rows]
        ]
        yield token_batch(chosen, spans, device)


def sequence_batches(sequences: Sequence[NDArray[np.int64]], spans: Spans | None, device: str) -> Iterator[TokenBatch]:
    """Yield sequences of differing lengths, similar ones together, padded on the right."""
    ordered = sorted((s for s in sequences if len(s)), key=len)
    batch: list[NDArray[np.int64]] = []
    for sequence in ordered:
        if batch and len(sequence) * (len(batch) + 1) > TOKENS_A_BATCH:
            yield token_batch(batch, spans, device)
            batch = []
        batch.append(sequence)
    if batch:
        yield token_batch(batch, spans, device)


def token_batch(sequences: Sequence[NDArray[np.int64]], spans: Spans | None, device: str) -> TokenBatch:
    """Return sequences as one batch, padded on the right; a pad continues its row's last span."""
    length = max(len(s) for s in sequences)
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    numbers = np.zeros_like(ids) if spans else None
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
        if spans is not None and numbers is not None:
            own = np.asarray(spans(sequence), dtype=np.int64)
            numbers[row] = own[-1]
            numbers[row, : len(sequence)] = own
    arrays = [None if a is None else torch.from_numpy(a).to(device) for a in (ids, mask, numbers)]
    assert arrays[0] is not None
    assert arrays[1] is not None
    return TokenBatch(arrays[0], arrays[1], arrays[2])
