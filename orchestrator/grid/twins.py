"""Cells that are written apart and compute the same: presets that come to equal fields, C2R where it never begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from orchestrator.catalog.routers import kind_of
from orchestrator.grid.expand import GridCell
from orchestrator.spec.cell import EvaluateSpec
from orchestrator.spec.identity import digest
from orchestrator.spec.model import Model
from orchestrator.spec.rules import PHASES


def computed(model: Model, *, finetuned: bool) -> Model:
    """Return `model` as what it computes: without the name of a preset that only fills in fields.

    C2R begins with fine-tuning; before, and where there is none, its limit does nothing.
    """
    moe = model.moe
    if not finetuned:
        moe = dataclasses.replace(moe, collaboration_top=0)
    if kind_of(moe).plain:
        moe = dataclasses.replace(moe, preset="", variant="")
    return dataclasses.replace(model, moe=moe)


def same_science(cells: Iterable[GridCell]) -> Iterator[tuple[GridCell, GridCell]]:
    """Yield pairs of cells with different ids that compute the same."""
    items = list(cells)
    known: dict[int, str] = {}

    def of(section: object) -> str:
        if id(section) not in known:
            known[id(section)] = digest(section)
        return known[id(section)]

    def measured(evaluate: EvaluateSpec) -> str:
        if id(evaluate) not in known:
            known[id(evaluate)] = digest(dataclasses.replace(evaluate, at=(), suites=()))
        return known[id(evaluate)]

    models: dict[tuple[int, bool], str] = {}
    for item in items:
        key = (id(item.cell.model), item.cell.finetune is not None)
        if key not in models:
            models[key] = digest(computed(item.cell.model, finetuned=key[1]))
    if len(set(models.values())) == len({of(item.cell.model) for item in items}):
        return
    first: dict[tuple[str, ...], GridCell] = {}
    for item in items:
        cell = item.cell
        model = models[id(cell.model), cell.finetune is not None]
        rest = (cell.tokenizer, cell.seed, *(getattr(cell, phase) for phase in PHASES))
        evaluate = dataclasses.replace(cell.evaluate, at=(), suites=())
        same = (model, *(of(part) for part in rest), digest(evaluate))
        other = first.setdefault(same, item)
        if other.id != item.id:
            yield other, item
