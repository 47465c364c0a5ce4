"""The suite `probe`: how a committed state routes named, seeded token sets; metrics, and arrays for figures.

Accuracies with the router disturbed come with it.
Token sets: `heldout` (validation text) and one per task (the right answers of its items, without shots). The blob
`probe.npz` (no pickles) holds, per set, `<set>.counts` [L,N], `<set>.pairs` [L,N,N], `<set>.scores` [L,ids] (means) and
the metrics per layer [L]; and `sample` [L,T,K], the experts of the first tokens of `heldout` (saturation and change
rate between any two states follow from their samples), `weight_similarity` and `output_similarity` [L,N,N].
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.evaluate.chunks import prepare
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.state import load_state
from jobs.evaluate.suites.disturbed import disturbed
from jobs.probe.collect import HELDOUT, SAMPLE_TOKENS, Collector
from jobs.probe.sets import TokenBatch, routings_of, sequence_batches, text_batches
from jobs.probe.similarity import SIMILARITY_TOKENS, off_diagonal, output_similarity, weight_similarity

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork


def run(context: StageContext, work: EvaluateWork) -> None:
    """Probe the state and commit `probe.npz` with the metrics."""
    state = load_state(context, work)
    model, device = state.model, context.execution.device
    stream = np.load(context.fetch(work.tokens, "heldout_tokens.npy"), mmap_mode="r", allow_pickle=False)

    def heldout(limit: int) -> Iterator[TokenBatch]:
        return text_batches(stream, min(work.max_length, len(stream)), limit, work.seed, state.spans, device)

    sets: dict[str, Iterable[TokenBatch]] = {HELDOUT: heldout(work.val_tokens)}
    changed: dict[str, float] = {}
    if work.tasks:
        lm = PrefixLM(model, state.tokenizer, max_length=work.max_length, spans=state.spans)
        plain = replace(work, tasks=tuple(replace(task, shots=0) for task in work.tasks))
        for task in prepare(context, plain, lm, work.limit):
            pairs = task.encodings([item.requests[item.gold] for item in task.items])
            texts = [np.concatenate(pair)[-work.max_length :].astype(np.int64) for pair in pairs]
            sets[task.name] = sequence_batches(texts, state.spans, device)
        asked = prepare(context, work, lm, work.limit)
        with torch.inference_mode():
            changed = disturbed(model, lm, asked, {task.name: task.metric for task in work.tasks})
    collector = Collector(SAMPLE_TOKENS, work.metrics)
    with torch.inference_mode():
        for number, (name, batches) in enumerate(sets.items()):
            for batch in batches:
                collector.observe(name, routings_of(model, batch))
                context.check()
            context.progress(number + 1, len(sets))
    weights, outputs = weight_similarity(model), output_similarity(model, heldout(SIMILARITY_TOKENS))
    arrays = {**collector.arrays(), "weight_similarity": weights, "output_similarity": outputs}
    metrics = {
        **collector.metrics(),
        **changed,
        "expert_weight_similarity": off_diagonal(weights),
        "expert_output_similarity": off_diagonal(outputs),
    }
    info = {
        "expert_counts": collector.totals[HELDOUT].counts_LN.tolist(),
        "tokens": {name: int(totals.tokens_L[0]) for name, totals in collector.totals.items()},
        "score": model.spec.moe.score,
    }
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
    context.commit(work, blobs={"probe.npz": sink.getvalue()}, metrics=metrics, info=info)
