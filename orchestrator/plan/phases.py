"""Which model each training phase of a cell trains, and what of a model that sees is frozen in it."""

from __future__ import annotations

import dataclasses
import math

from orchestrator.catalog.freezing import freezes_part
from orchestrator.catalog.routers import kind_of
from orchestrator.plan.cost import UNKNOWN_ITEMS
from orchestrator.spec.cell import Cell
from orchestrator.spec.model import Model
from orchestrator.spec.resolve import before_upcycling, encoder_block, text_part
from orchestrator.spec.rules import SEEING, UPCYCLED
from orchestrator.spec.schedule import freeze_phases
from orchestrator.spec.vision import EncoderSpec, VisionSpec

# The freeze rule of the vision encoder.
ENCODER = "vision"


def before_finetuning(model: Model) -> Model:
    """Return the model that the initial weights and pretraining belong to: C2R's limit is not there yet.

    So a model with the limit shares them with the one without. A preset that needs it is never without.
    """
    if not model.moe.collaboration_top or "collaboration_top" in kind_of(model.moe).needs:
        return model
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, collaboration_top=0))


def model_in(cell: Cell, phase: str) -> Model:
    """Return the model that a phase trains."""
    model = cell.model
    if model.vision is None:
        return model if phase == "finetune" else before_finetuning(model)
    if phase not in SEEING:
        return text_part(model)
    upcycled = phase == UPCYCLED and model.vision.upcycle and kind_of(model.moe).routes
    return model if upcycled else before_upcycling(model)


def begins(cell: Cell, phase: str) -> bool:
    """Return whether a phase goes on with another model than the phase before it, whose weights it begins in."""
    phases = list(cell.phases)
    at = phases.index(phase)
    return at > 0 and phase in SEEING and model_in(cell, phase) != model_in(cell, phases[at - 1])


def always_frozen(cell: Cell, phase: str) -> str:
    """Return the word of what a phase freezes whatever its schedule says: the encoder where the connector trains."""
    vision = cell.model.vision
    return ENCODER if vision is not None and vision.train == "connector" and phase in SEEING else ""


def reads_features(cell: Cell, phase: str) -> bool:
    """Return whether some of a phase can read what the encoder made of its pictures before anything trained it."""
    if phase not in SEEING:
        return False
    if always_frozen(cell, phase):
        return True
    if kind_of(encoder_block(model_in(cell, phase))).routes:
        return False
    for name, train in cell.phases.items():
        frozen = [freezes_part(span.frozen, ENCODER) for span in freeze_phases(train.freeze, train.steps)]
        if name == phase:
            return bool(frozen) and frozen[0]
        if name in SEEING and not all(frozen):
            return False
    return False


def held_questions(cell: Cell) -> int:
    """Return about how many questions the last phase that shows pictures holds out; unknown sets have 1,000 rows."""
    shown = [train.data for phase, train in cell.phases.items() if phase in SEEING]
    rows = [one.rows or UNKNOWN_ITEMS for data in shown[-1:] for one in data.corpora or (data,)]
    return math.ceil(sum(rows) * shown[-1].holdout) if shown else 0


def encoder_of(vision: VisionSpec) -> EncoderSpec:
    """Return the encoder alone, so that all that sees through it shares its features."""
    return EncoderSpec(**{field.name: getattr(vision, field.name) for field in dataclasses.fields(EncoderSpec)})
