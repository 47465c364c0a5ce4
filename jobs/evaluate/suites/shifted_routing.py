"""The suite `shifted_routing`: how far routing moves, layer by layer, when a benchmark's items are put otherwise.

MoE-RBench, Figure 3: the L1 distance of a layer's mean routing on shifted items from that on their clean twins (SST-2
and its styles). The blob `routing_shift.npz` (no pickles) holds `<task>` [L], 0 to 2.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.evaluate.chunks import prepare
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.state import load_state
from jobs.probe.collect import Collector
from jobs.probe.metrics import distribution_distance_L
from jobs.probe.sets import routings_of, sequence_batches
from orchestrator.catalog.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork


def run(context: StageContext, work: EvaluateWork) -> None:
    """Route the right answers of every task and twin, without shots, and commit the distances."""
    state, device = load_state(context, work), context.execution.device
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans)
    plain = replace(
        work,
        tasks=tuple(replace(task, shots=0) for task in work.tasks),
        clean=tuple(replace(task, shots=0) for task in work.clean),
    )
    tasks = [*prepare(context, plain, lm, work.limit), *prepare(context, plain, lm, work.limit, clean=True)]
    collector = Collector()
    with torch.inference_mode():
        for number, task in enumerate(tasks):
            pairs = task.encodings([item.requests[item.gold] for item in task.items])
            texts = [np.concatenate(pair)[-work.max_length :].astype(np.int64) for pair in pairs]
            for batch in sequence_batches(texts, state.spans, device):
                collector.observe(task.name, routings_of(state.model, batch))
                context.check()
            context.progress(number + 1, len(tasks))
    twins = BENCHMARKS[work.benchmark].twins
    routed = {name: totals.distribution_LN() for name, totals in collector.totals.items()}
    moved = {
        name: distribution_distance_L(routed[twins[name]], routed[name]) for name in routed if twins.get(name) in routed
    }
    metrics = {f"{name}/routing_shift": float(distance_L.mean()) for name, distance_L in moved.items()}
    if moved:
        metrics[f"{work.benchmark}_routing_shift"] = float(np.mean(list(moved.values())))
    sink = io.BytesIO()
    np.savez_compressed(sink, **moved)  # type: ignore[arg-type]
    context.commit(work, blobs={"routing_shift.npz": sink.getvalue()}, metrics=metrics)
