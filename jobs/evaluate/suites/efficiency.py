"""The suite `efficiency`: how a model uses its experts (MoE-Bench section 4), averaged over the evaluated tasks.

The same requests are scored under several interventions: nothing (`base`), the least used expert of every layer removed
(`pruned`), and random routing with several seeds (`random-<seed>`). Counts come from the base pass, without padding; a
shared prefix counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from jobs.evaluate.chunks import Chunk, chunks, deviations, outcomes, prepare, task_info
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
    from jobs.node.context import StageContext
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
    tasks = prepare(context, work, lm, limit=work.limit)
    parts = [chunk for task in tasks for chunk in chunks(task)]
    ledger = Ledger(context)
    passes = 2 + work.routing_seeds

    def scored(name: str, compute: Callable[[Chunk], dict[str, Any]], number: int) -> list[dict[str, Any]]:
        return ledger.scored(
            [(f"{name}/{chunk.name}", partial(compute, chunk)) for chunk in parts],
            lambda done: context.progress(number * len(parts) + done, passes * len(parts)),
        )

    def measured(chunk: Chunk) -> dict[str, Any]:
        usage.reset()
        answers = chunk.answers(lm)
        return {"answers": answers, "usage": usage.to_json(), **chunk.deviation(answers, lm)}

    def rows_of(name: str, values: Sequence[dict[str, Any]]) -> list[Scored]:
        pairs = zip(parts, values, strict=True)
        return [row for chunk, value in pairs for row in outcomes(chunk, value["answers"], name)]

    base = scored(BASE, measured, 0)
    rows = {BASE: rows_of(BASE, base)}
    totals = _totals(parts, base, usage)
    pooled = sum(total.counts_LN for total in totals.values())
    removed = {layer: int(expert) for layer, expert in enumerate(least_used(pooled))}
    seeds = [work.seed + number for number in range(work.routing_seeds)]
    interventions = [(PRUNED, pruned(state.model, removed))]
    interventions += [(f"random-{seed}", random_routing(state.model, seed)) for seed in seeds]
    for number, (name, intervention) in enumerate(interventions):
        with intervention:
            rows[name] = rows_of(name, scored(name, lambda chunk: {"answers": chunk.answers(lm)}, number + 1))
    names = [spec.name for spec in work.tasks]
    table = summarise(names, rows, totals, {spec.name: spec.metric for spec in work.tasks})
    info = {**table.info, **task_info(tasks, work), **deviations(base)}
    info |= {"removed_experts": removed, "routing_seeds": seeds, "expert_counts": np.asarray(pooled).tolist()}
    every = [row for group in rows.values() for row in group]
    ledger.commit(work, blobs={"items.parquet": items_parquet(every)}, metrics=table.metrics, info=info)


def _totals(parts: Sequence[Chunk], values: Sequence[dict[str, Any]], usage: Usage) -> dict[str, RoutingTotals]:
    """Return the routing totals of each task from those of its chunks."""
    totals: dict[str, RoutingTotals] = {}
    for chunk, value in zip(parts, values, strict=True):
        total = totals.setdefault(chunk.task.name, RoutingTotals(*usage.totals.counts_LN.shape))
        total.counts_LN += np.array(value["usage"]["counts"])
        total.pairs_LNN += np.array(value["usage"]["pairs"])
        total.tokens_L += np.array(value["usage"]["tokens"])
    return totals


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
