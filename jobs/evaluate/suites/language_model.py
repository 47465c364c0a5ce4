"""The suite `lm`: loss and bits per byte of held-out documents, or of held-out responses where there is no other text.

Documents are taken whole, in their order, up to `val_tokens`. A document is scored in windows of `max_length` tokens
that overlap by one; its begin-of-text token is context only, and its end-of-text token is not scored. Of an instruction
(a cell that starts from a checkpoint reads no pretraining text) the response is scored, the prompt is its context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

Ids = NDArray[np.int64]

# Windows scored and stored together.
CHUNK_WINDOWS = 256


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score the held-out documents and commit `val_loss` (nats a token), `bits_per_byte` and `items.parquet`."""
    state = load_state(context, work)
    texts = heldout(context, work, state.tokenizer)
    pieces = [piece for text in texts for piece in text.pieces]
    owner = np.repeat(np.arange(len(texts)), [len(text.pieces) for text in texts])
    scorer = Scorer(Model(state.model, state.spans))
    room = batch_tokens(len(state.tokenizer), scorer.model.device)

    def scored(part: Sequence[tuple[Ids, Ids]]) -> list[float]:
        windows = plan(part, share=False, tokens_per_batch=room, rows=int(scorer.model.by_length))
        return list(scorer.run(windows).loglikelihood.tolist())

    groups = [pieces[at : at + CHUNK_WINDOWS] for at in range(0, len(pieces), CHUNK_WINDOWS)]
    ledger = Ledger(context)
    values = ledger.scored(
        [(f"lm-{number}", partial(scored, group)) for number, group in enumerate(groups)],
        lambda done: context.progress(min(done * CHUNK_WINDOWS, len(pieces)), len(pieces)),
    )
    nats = np.bincount(owner, weights=-np.concatenate(values), minlength=len(texts))
    counts = np.array([sum(len(predicted) for _, predicted in text.pieces) for text in texts])
    bytes_ = np.array([text.size for text in texts])
    table = Table()
    table.add("val_loss", ratio("val_loss", nats, counts))
    table.add("bits_per_byte", ratio("bits_per_byte", nats / math.log(2), bytes_))
    rows = [
        Scored("heldout", str(i), 0, Outcome((-float(n),), math.nan, math.nan, float(n) / math.log(2) / float(size)))
        for i, (n, size) in enumerate(zip(nats, bytes_, strict=True))
    ]
    info = {**table.info, "documents": len(texts), "tokens": int(counts.sum()), "bytes": int(bytes_.sum())}
    ledger.commit(work, blobs={"items.parquet": items_parquet(rows)}, metrics=table.metrics, info=info)


@dataclass(frozen=True, slots=True)
class Text:
    """One held-out text: (tokens to feed, tokens to predict) piece by piece, and its size in UTF-8 bytes."""

    pieces: list[tuple[Ids, Ids]]
    size: int


def heldout(context: StageContext, work: EvaluateWork, tokenizer: Any) -> list[Text]:
    """Return the held-out documents of the tokens artifact, or its responses when it holds instructions."""
    names = {blob.name for blob in context.manifest(work.tokens).blobs}

    def array(name: str) -> NDArray[Any]:
        found: NDArray[Any] = np.load(context.fetch(work.tokens, f"heldout_{name}.npy"), allow_pickle=False)
        return found

    tokens = array("tokens")
    if "heldout_docs.npy" in names:
        documents = chosen(tokens, array("docs"), work.val_tokens)
        return [
            Text(windows(document, work.max_length), int(size))
            for document, size in zip(documents, array("bytes"), strict=False)
        ]
    examples = chosen(tokens, array("offsets")[:-1], work.val_tokens)
    mask, first = array("loss_mask"), array("offsets")
    found = []
    for example, begin in zip(examples, first, strict=False):
        # A response, or the answers of a conversation, without the end-of-text token.
        pieces, size = [], 0
        for start, stop in _runs(mask[begin : begin + len(example)]):
            response = example[start:stop]
            if start:
                fed = example[: stop - 1][-work.max_length :]
                pieces.append((fed, response[-len(fed) :]))
                size += len(tokenizer.decode(response).encode())
        if pieces and size:
            found.append(Text(pieces, size))
    if not found:
        raise SourceError("there are no held-out responses", hint="raise data.holdout")
    return found


def _runs(mask: NDArray[Any]) -> list[tuple[int, int]]:
    """Return (begin, end) of each stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


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
