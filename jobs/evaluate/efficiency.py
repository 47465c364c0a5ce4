"""The suite `efficiency`: how a model uses its experts (MoE-Bench section 4), averaged over the evaluated tasks.

The same requests are scored under several interventions: nothing (`base`), the least used expert of every layer removed
(`pruned`), and random routing with several seeds (`random-<seed>`). Counts come from the base pass, without padding; a
shared prefix counts once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from jobs.evaluate.chunks import Chunk, chunks, outcomes, prepare, task_info
from jobs.evaluate.ledger import Ledger
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.results import BASE, Mean, Scored, Table, items_parquet
from jobs.evaluate.state import load_state
from jobs.moe.interventions import pruned, random_routing
from jobs.moe.routing import Routing
from jobs.probe.accumulate import RoutingTotals
from jobs.probe.metrics import in_range, least_used
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.context import StageContext
    from orchestrator.spec.work import EvaluateWork

PRUNED = "pruned"


class Usage:
    """Expert counts and pair counts of one task, filled by the scorer's passes."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = (layers, experts)
        self.totals = RoutingTotals(layers, experts)

    def reset(self) -> None:
        self.totals = RoutingTotals(*self._shape)

    def __call__(self, routings: tuple[Routing, ...], real_BS: Tensor) -> None:
        for layer, routing in enumerate(routings):
            indices = routing.expert_indices().cpu().numpy()
            self.totals.update(layer, indices, mask_T=real_BS.reshape(-1).cpu().numpy())

    def to_json(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "counts": totals.counts_LN.tolist(),
            "pairs": totals.pairs_LNN.tolist(),
            "tokens": totals.tokens_L.tolist(),
        }


def run(context: StageContext, work: EvaluateWork) -> None:
    """Score the tasks under every intervention and commit the efficiency metrics with `items.parquet`."""
    state = load_state(context, work)
    blocks = state.model.moe_blocks
    if not blocks:
        raise MoegridError(
            "a dense model has no experts to measure", hint="leave the suite efficiency out for dense cells"
        )
    usage = Usage(len(blocks), blocks[0].moe.num_experts)
    lm = PrefixLM(state.model, state.tokenizer, max_length=work.max_length, spans=state.spans, observer=usage)
    tasks = prepare(work, context.directory(work.items), lm, limit=work.limit)
    parts = [chunk for task in tasks for chunk in chunks(task, lm)]
    ledger = Ledger(context)
    interventions = 2 + work.routing_seeds

    def scored(name: str, intervention: AbstractContextManager[None], number: int) -> list[Scored]:
        rows: list[Scored] = []
        with intervention:
            for at, chunk in enumerate(parts):
                answers = ledger.once(f"{name}/{chunk.name}", partial(chunk.answers, lm))
                rows += outcomes(chunk, answers, name)
                context.progress(number * len(parts) + at + 1, interventions * len(parts))
        return rows

    totals, base = _base(parts, lm, usage, ledger)
    context.progress(len(parts), interventions * len(parts))
    pooled = sum(total.counts_LN for total in totals.values())
    removed = {layer: int(expert) for layer, expert in enumerate(least_used(pooled))}
    rows = {BASE: base, PRUNED: scored(PRUNED, pruned(state.model, removed), 1)}
    seeds = [work.seed + number for number in range(work.routing_seeds)]
    for number, seed in enumerate(seeds):
        name = f"random-{seed}"
        rows[name] = scored(name, random_routing(state.model, seed), 2 + number)
    names = [spec.name for spec in work.tasks]
    table = summarise(names, rows, totals, {spec.name: spec.metric for spec in work.tasks})
    info = {**table.info, **task_info(tasks, work), "removed_experts": removed, "routing_seeds": seeds}
    info |= {"expert_counts": np.asarray(pooled).tolist(), "chunks_reused": ledger.reused}
    every = [row for group in rows.values() for row in group]
    context.commit(work, blobs={"items.parquet": items_parquet(every)}, metrics=table.metrics, info=info)
    ledger.clear()


def _base(
    parts: Sequence[Chunk], lm: PrefixLM, usage: Usage, ledger: Ledger
) -> tuple[dict[str, RoutingTotals], list[Scored]]:
    """Score without intervention; return the routing totals of each task and the items."""
    totals: dict[str, RoutingTotals] = {}
    rows: list[Scored] = []

    def measured(chunk: Chunk) -> dict[str, Any]:
        usage.reset()
        return {"answers": chunk.answers(lm), "usage": usage.to_json()}

    for chunk in parts:
        stored = ledger.once(f"{BASE}/{chunk.name}", partial(measured, chunk))
        rows += outcomes(chunk, stored["answers"])
        total = totals.setdefault(chunk.task.name, RoutingTotals(*usage.totals.counts_LN.shape))
        total.counts_LN += np.array(stored["usage"]["counts"])
        total.pairs_LNN += np.array(stored["usage"]["pairs"])
        total.tokens_L += np.array(stored["usage"]["tokens"])
    return totals, rows


def summarise(
    tasks: Sequence[str], rows: dict[str, list[Scored]], totals: dict[str, RoutingTotals], primary: dict[str, str]
) -> Table:
    """Return load_balance and collaboration (bits), capacity and specialization (accuracy, and in bits per byte).

    Differences are paired by item; standard errors are over items and, for specialization, over routing seeds too.
    """
    table = Table()
    for name, per_layer in (("load_balance", "load_balance_L"), ("collaboration", "collaboration_L")):
        table.add(name, Mean.of([float(getattr(totals[task], per_layer)().mean()) for task in tasks], name, 0.0))
    random = [name for name in rows if name not in (BASE, PRUNED)]
    for suffix, sign, high in (("", 1.0, 1.0), ("_bpb", -1.0, math.inf)):
        values = {name: _by_task(group, tasks, primary, bool(suffix)) for name, group in rows.items()}
        losses = [sign * (values[BASE][task] - values[PRUNED][task]) for task in tasks]
        table.add(f"capacity{suffix}", Mean.over([Mean.of(d, f"capacity{suffix}", -high, high) for d in losses]))
        if random:
            drops = [[sign * (values[BASE][task] - values[name][task]) for task in tasks] for name in random]
            table.add(f"specialization{suffix}", _over_seeds(f"specialization{suffix}", drops, high))
    return table


def _by_task(
    rows: Sequence[Scored], tasks: Sequence[str], primary: dict[str, str], bits: bool
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return each task's per-item values, in item order."""
    return {
        task: np.array(
            [r.outcome.answer_bpb if bits else getattr(r.outcome, primary[task]) for r in rows if r.task == task]
        )
        for task in tasks
    }


def _over_seeds(name: str, drops: Sequence[Sequence[np.ndarray[Any, Any]]], high: float) -> Mean:
    """Return the mean over routing seeds of the task average; its error adds that over items and that over seeds."""
    per_item = [np.mean([seed[task] for seed in drops], axis=0) for task in range(len(drops[0]))]
    over_items = Mean.over([Mean.of(values, name, -high, high) for values in per_item])
    per_seed = Mean.of([float(np.mean([values.mean() for values in seed])) for seed in drops], name, -high, high)
    stderr = math.hypot(over_items.stderr, per_seed.stderr)
    return Mean(in_range(name, per_seed.value, -high, high), stderr, over_items.n)
