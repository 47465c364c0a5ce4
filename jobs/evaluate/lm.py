"""The suite `lm`: loss and bits per byte of held-out documents.

Documents are taken whole, in their order, up to `val_tokens`. A document is scored in windows of `max_length` tokens
that overlap by one; its begin-of-text token is context only, and its end-of-text token is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.evaluate.ledger import Ledger
from jobs.evaluate.prefix_tree import plan
from jobs.evaluate.results import Mean, Outcome, Scored, Table, items_parquet
from jobs.evaluate.scoring import Model, Scorer, batch_tokens
from jobs.evaluate.state import load_state
from jobs.probe.metrics import in_range
from orchestrator.errors import SourceError

if TYPE_CHECKING:
    from jobs.context import StageContext
    from orchestrator.spec.work import EvaluateWork

Ids = NDArray[np.int64]

# Windows scored and stored together.
CHUNK_WINDOWS = 256


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score the held-out documents and commit `val_loss` (nats a token), `bits_per_byte` and `items.parquet`."""
    state = load_state(context, work)
    tokens = np.load(context.fetch(work.tokens, "heldout_tokens.npy"), allow_pickle=False)
    starts = np.load(context.fetch(work.tokens, "heldout_docs.npy"), allow_pickle=False)
    sizes = np.load(context.fetch(work.tokens, "heldout_bytes.npy"), allow_pickle=False)
    documents = chosen(tokens, starts, work.val_tokens)
    pieces = [piece for document in documents for piece in windows(document, work.max_length)]
    owner = np.repeat(np.arange(len(documents)), [len(windows(d, work.max_length)) for d in documents])
    scorer = Scorer(Model(state.model, state.spans))
    room = batch_tokens(len(state.tokenizer), scorer.model.device)

    def scored(part: Sequence[tuple[Ids, Ids]]) -> list[float]:
        return scorer.run(plan(part, share=False, tokens_per_batch=room)).loglikelihood.tolist()

    groups = [pieces[at : at + CHUNK_WINDOWS] for at in range(0, len(pieces), CHUNK_WINDOWS)]
    ledger = Ledger(context)
    values = ledger.scored(
        [(f"lm-{number}", partial(scored, group)) for number, group in enumerate(groups)],
        lambda done: context.progress(min(done * CHUNK_WINDOWS, len(pieces)), len(pieces)),
    )
    nats = np.bincount(owner, weights=-np.concatenate(values), minlength=len(documents))
    counts = np.array([len(document) - 1 for document in documents])
    bytes_ = sizes[: len(documents)]
    table = Table()
    table.add("val_loss", ratio("val_loss", nats, counts))
    table.add("bits_per_byte", ratio("bits_per_byte", nats / math.log(2), bytes_))
    rows = [
        Scored("heldout", str(i), 0, Outcome((-float(n),), math.nan, math.nan, float(n) / math.log(2) / float(size)))
        for i, (n, size) in enumerate(zip(nats, bytes_, strict=True))
    ]
    info = {**table.info, "documents": len(documents), "tokens": int(counts.sum()), "bytes": int(bytes_.sum())}
    ledger.commit(work, blobs={"items.parquet": items_parquet(rows)}, metrics=table.metrics, info=info)


def chosen(tokens: NDArray[np.unsignedinteger], starts: NDArray[np.int64], limit: int) -> list[Ids]:
    """Return the first documents whose tokens fit `limit` (0 = all), at least one, without their end-of-text token."""
    edges = [*starts.tolist(), len(tokens)]
    documents: list[Ids] = []
    total = 0
    for begin, end in pairwise(edges):
        total += end - begin
        if documents and limit and total > limit:
            break
        documents.append(tokens[begin : end - 1].astype(np.int64))
    if not documents:
        raise SourceError("there are no held-out documents", hint="raise data.holdout")
    return documents


def windows(document: Ids, length: int) -> list[tuple[Ids, Ids]]:
    """Return (tokens to feed, tokens to predict) that cover a document, each token predicted once."""
    last = len(document) - 1
    return [
        (document[at : min(at + length, last)], document[at + 1 : at + length + 1]) for at in range(0, last, length)
    ]


def ratio(name: str, amounts: NDArray[Any], sizes: NDArray[Any]) -> Mean:
    """Return sum(amounts) / sum(sizes) with its standard error over documents."""
    amount, size = np.asarray(amounts, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    value = float(amount.sum() / size.sum())
    n = len(size)
    spread = math.sqrt(float(((amount - value * size) ** 2).sum()) * n / (n - 1)) / size.sum() if n > 1 else 0.0
    return Mean(in_range(name, value, 0.0), float(spread), n)
