"""The suite `probe`: how a committed state routes named, seeded token sets; metrics, and arrays for figures.

Accuracies with the router disturbed come with it.
Token sets: `heldout` (validation text) and one per task (the right answers of its items, without shots). Everything is
streamed: memory depends on layers and experts, never on the number of tokens. The blob `probe.npz` (no pickles) holds,
per set, `<set>.counts` [L,N], `<set>.pairs` [L,N,N], `<set>.scores` [L,ids] (means) and the metrics per layer [L]; and
`sample` [L,T,K], the experts of the first tokens of `heldout` (saturation and change rate between any two states follow
from their samples), `weight_similarity` and `output_similarity` [L,N,N].
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.probe.accumulate import RoutingTotals
from jobs.probe.metrics import Floats, distribution_distance_L, in_range
from jobs.probe.sets import TokenBatch, routings_of, sequence_batches, text_batches
from jobs.probe.similarity import SIMILARITY_TOKENS, off_diagonal, output_similarity, weight_similarity

if TYPE_CHECKING:
    from jobs.context import StageContext
    from jobs.models.backbones import CausalLM
    from jobs.moe.routing import Routing
    from orchestrator.spec.work import EvaluateWork

HELDOUT = "heldout"
SAMPLE_TOKENS = 4096


class Collector:
    """Sums up the routing records of named token sets."""

    def __init__(self, sample: int = 0) -> None:
        self.totals: dict[str, RoutingTotals] = {}
        self.null_slots: dict[str, list[int]] = {}
        self._sample = sample
        self._samples: list[NDArray[np.int16]] = []

    def observe(self, name: str, routings: Sequence[Routing]) -> None:
        """Add the records of one forward pass, one a layer; padding does not count."""
        first = routings[0]
        if name not in self.totals:
            self.totals[name] = RoutingTotals(len(routings), first.num_experts, first.num_ids)
            self.null_slots[name] = [0, 0]
        totals = self.totals[name]
        left = self._sample - (len(self._samples[0]) if self._samples else 0) if name == HELDOUT else 0
        rows: list[NDArray[np.int16]] = []
        for layer, routing in enumerate(routings):
            experts = _numpy(routing.expert_indices())
            ids = experts if routing.physical is None else _numpy(routing.indices)
            mask = _numpy(routing.mask)
            totals.update(
                layer,
                experts,
                weights_Tk=_numpy(routing.weights.float()),
                scores_TN=_numpy(routing.scores.float()),
                mask_T=mask if routing.padded else None,
                ids_Tk=ids,
            )
            if routing.null is not None:
                start, stop = routing.null
                real = ids[ids >= 0]
                self.null_slots[name][0] += int(((real >= start) & (real < stop)).sum())
                self.null_slots[name][1] += real.size
            if left > 0:
                rows.append(experts[mask][:left].astype(np.int16))
        if rows:
            old = self._samples
            self._samples = [_joined(*pair) for pair in zip(old, rows, strict=True)] if old else rows

    def metrics(self) -> dict[str, float]:
        """Return every set's metrics, means over layers: plain names for `heldout`, `<set>/<name>` for the others."""
        found: dict[str, float] = {}
        for name, totals in self.totals.items():
            prefix = "" if name == HELDOUT else f"{name}/"
            for metric, values in self.per_layer(name).items():
                found[f"{prefix}{metric}"] = float(np.mean(values))
            if name != HELDOUT and HELDOUT in self.totals:
                distance = distribution_distance_L(self.totals[HELDOUT].distribution_LN(), totals.distribution_LN())
                found[f"{prefix}routing_distance"] = float(distance.mean())
            nulls, slots = self.null_slots[name]
            if slots:
                found[f"{prefix}null_share"] = in_range("null_share", nulls / slots, 0.0, 1.0)
        return found

    def per_layer(self, name: str) -> dict[str, Floats]:
        """Return the metrics of one set per layer."""
        totals = self.totals[name]
        found = {
            "probe_load_balance": totals.load_balance_L(),
            "probe_collaboration": totals.collaboration_L(),
            "expert_allocation_entropy": totals.expert_allocation_entropy_L(),
            "expert_weight_entropy": totals.expert_weight_entropy_L(),
        }
        if totals.scores_LN.shape[1] > 1:
            found["router_margin"] = totals.router_margin_L()
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of `probe.npz` that come from routing records."""
        found: dict[str, NDArray[Any]] = {}
        for name, totals in self.totals.items():
            found[f"{name}.counts"] = totals.counts_LN
            found[f"{name}.pairs"] = totals.pairs_LNN
            found[f"{name}.scores"] = totals.distribution_LN()
            for metric, values in self.per_layer(name).items():
                found[f"{name}.{metric}"] = values
        if self._samples:
            found["sample"] = np.stack(self._samples)
        return found


@torch.inference_mode()
def probe(model: CausalLM, sets: Mapping[str, Iterable[TokenBatch]], sample: int = SAMPLE_TOKENS) -> Collector:
    """Return what `model` does with every token set; one forward pass a batch, without the head."""
    collector = Collector(sample)
    for name, batches in sets.items():
        for batch in batches:
            collector.observe(name, routings_of(model, batch))
    return collector


def run(context: StageContext, work: EvaluateWork) -> None:
    """Probe the state and commit `probe.npz` with the metrics."""
    from jobs.evaluate.chunks import prepare
    from jobs.evaluate.prefix_lm import PrefixLM
    from jobs.evaluate.state import load_state
    from jobs.probe.interventions import disturbed

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
    collector = Collector(SAMPLE_TOKENS)
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


def _joined(first_TK: NDArray[np.int16], more_TK: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the tokens of both, the narrower one's missing slots empty (expert choice varies them)."""
    slots = max(first_TK.shape[1], more_TK.shape[1])
    wide = [np.pad(a, ((0, 0), (0, slots - a.shape[1])), constant_values=-1) for a in (first_TK, more_TK)]
    return np.concatenate(wide)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
