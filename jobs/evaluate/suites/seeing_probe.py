"""The suite `seeing_probe`: how the experts of the vision encoder and of the connector route what they see.

It reads the questions about pictures that the last phase held out. Columns: of each of the components `encoder` and
`connector` that has experts, `<component>/<metric>` of routing and of similarity, and with this component's routers
alone disturbed the accuracy (`temperature_*`) or its change (`drop_top*`); a question is answered where every token of
its answer is the likeliest one, which is what greedy decoding gives. The blob `sight.npz` (no pickles) holds each
component's arrays as `<component>.<set>.<name>`, layer by layer: the sets are `heldout`, all tokens of all pictures,
and each subtask of the questions; `info["subtasks"]` tells questions and accuracy by subtask.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.data.packing import IGNORED, Batch, InstructionBatches
from jobs.data.whole_tables import whole_rows
from jobs.evaluate.state import load_state
from jobs.evaluate.suites.disturbed import DROPS, interventions
from jobs.moe.block import MoEBlock
from jobs.probe.collect import HELDOUT, SAMPLE_TOKENS, Collector
from jobs.probe.metrics import drop_top, in_range
from jobs.probe.sets import TokenBatch, routings_of
from jobs.probe.similarity import SIMILARITY_TOKENS, off_diagonal, output_similarity, weight_similarity
from orchestrator.errors import SourceError
from orchestrator.spec.work import TokensWork, work_from_json

if TYPE_CHECKING:
    from jobs.models.backbones import CausalLM
    from jobs.moe.routing import Routing
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork

ROWS_A_BATCH = 16
ENCODER = "encoder"
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Component:
    """A part that sees and has experts: its module, its blocks, and where their records begin among the model's."""

    name: str
    module: nn.Module
    blocks: Sequence[MoEBlock]
    first: int

    def of(self, routings: Sequence[Routing]) -> Sequence[Routing]:
        """Return the part's own of a pass's records."""
        return routings[self.first : self.first + len(self.blocks)]


def components(model: CausalLM) -> list[Component]:
    """Return the parts of a model's vision side that have experts."""
    assert model.vision is not None, "the plan asks models that see"
    encoder, connector = model.vision.encoder, model.vision.connector.block
    found = [Component(ENCODER, encoder, encoder.moe_blocks, 0)]
    if isinstance(connector, MoEBlock):
        found.append(Component("connector", connector, [connector], len(encoder.moe_blocks)))
    return [component for component in found if component.blocks]


class Rows(Protocol):
    """What gives rows of held-out questions as a batch, as `jobs.data.packing.InstructionBatches` does."""

    def of_rows(self, rows: Sequence[int]) -> Batch: ...


class Questions:
    """The held-out questions of a tokens artifact, in batches of rows of one subtask."""

    def __init__(self, batches: Rows, subtasks: Sequence[str]) -> None:
        self._batches, self._number = batches, len(subtasks)
        self.groups = {name: [n for n, one in enumerate(subtasks) if one == name] for name in dict.fromkeys(subtasks)}

    def chunks(self) -> Iterator[tuple[str, list[int]]]:
        """Yield (subtask, rows) of every batch."""
        for name, rows in self.groups.items():
            yield from ((name, rows[at : at + ROWS_A_BATCH]) for at in range(0, len(rows), ROWS_A_BATCH))

    def tokens(self, rows: Sequence[int], device: str) -> TokenBatch:
        """Return rows as a batch of tokens with pictures."""
        batch = self._batches.of_rows(rows)
        assert batch.images is not None
        return TokenBatch(batch.input_ids.to(device), batch.attention_mask.to(device), None, batch.images.to(device))

    def encoded(self, model: CausalLM, device: str) -> list[Tensor]:
        """Return what the encoder makes of the pictures, batch by batch [B,P,D]."""
        assert model.vision is not None
        return [model.vision.encoder(self.tokens(rows, device).images)[0] for _, rows in self.chunks()]

    def answered(self, model: CausalLM, device: str, encoded: Sequence[Tensor] | None = None) -> Bools:
        """Return for each row whether every token of its answer is the model's likeliest one.

        `encoded` is what the encoder makes of the pictures, where that is known.
        """
        found = np.zeros(self._number, dtype=bool)
        for number, (_, rows) in enumerate(self.chunks()):
            batch = self._batches.of_rows(rows)
            assert batch.images is not None
            labels, mask = batch.labels.to(device), batch.attention_mask.to(device)
            images = batch.images.to(device) if encoded is None else encoded[number]
            logits = model(batch.input_ids.to(device), attention_mask=mask, images=images).logits
            found[rows] = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).cpu().numpy()
        return found


@torch.inference_mode()
def run(context: StageContext, work: EvaluateWork) -> None:
    """Probe the components, and commit `sight.npz` with the metrics."""
    model, device = load_state(context, work).model, context.execution.device
    questions = _questions(context, work)

    encoded = questions.encoded(model, device)

    def answered(switched: AbstractContextManager[None], component: str = "") -> Bools:
        context.check()
        with switched:  # of the encoder alone it changes what the encoder makes
            return questions.answered(model, device, None if component == ENCODER else encoded)

    base = answered(nullcontext())
    metrics: dict[str, float] = {}
    arrays: dict[str, NDArray[np.generic]] = {}
    parts = components(model)
    for component, collector in zip(parts, _observed(model, questions, parts, device, context.check), strict=True):
        metrics |= {f"{component.name}/{name}": value for name, value in _of_heldout(collector).items()}
        metrics |= _disturbed(component, answered, _mean(base))
        arrays |= {f"{component.name}.{name}": array for name, array in collector.arrays().items()}
    if parts:
        every = (questions.tokens(rows, device) for _, rows in questions.chunks())
        alike = {"weight": weight_similarity(model), "output": output_similarity(model, every, SIMILARITY_TOKENS)}
        for component in parts:
            own = slice(component.first, component.first + len(component.blocks))
            for name, cosines in alike.items():
                arrays[f"{component.name}.{name}_similarity"] = cosines[own]
                metrics[f"{component.name}/expert_{name}_similarity"] = off_diagonal(cosines[own])
    subtasks = {
        name or "all": {"questions": len(rows), "exact_match": _mean(base[rows])}
        for name, rows in questions.groups.items()
    }
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
    context.commit(work, blobs={"sight.npz": sink.getvalue()}, metrics=metrics, info={"subtasks": subtasks})


def _questions(context: StageContext, work: EvaluateWork) -> Questions:
    """Return the held-out questions; their subtasks stand in the data that the tokens were made of."""
    directory, manifest = context.directory(work.tokens), context.manifest(work.tokens)
    made = work_from_json(manifest.spec)
    assert isinstance(made, TokensWork)
    rows = [row["subtask"] for row in whole_rows(context.fetch(made.data, "heldout.parquet"), "subtask")]
    if not rows:
        raise SourceError("no question about pictures is held out", hint="raise data.holdout of the last phase")
    pad = int(manifest.info.get("pad", 0))
    batches = InstructionBatches(directory, work.max_length, 0, split="heldout", loss="response", pad=pad)
    return Questions(batches, rows)


def _observed(
    model: CausalLM, questions: Questions, parts: Sequence[Component], device: str, check: Callable[[], None]
) -> list[Collector]:
    """Return what each component's routers do with the pictures: all of them, and by subtask."""
    collectors = [Collector(SAMPLE_TOKENS) for _ in parts]
    for subtask, rows in questions.chunks() if parts else ():
        routings = routings_of(model, questions.tokens(rows, device))
        for component, collector in zip(parts, collectors, strict=True):
            for name in (HELDOUT, *([subtask] if subtask else ())):
                collector.observe(name, component.of(routings))
        check()
    return collectors


def _of_heldout(collector: Collector) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in collector.per_layer(HELDOUT).items()}


def _disturbed(
    component: Component, answered: Callable[[AbstractContextManager[None], str], Bools], base: float
) -> dict[str, float]:
    """Return the accuracy changes and accuracies when this component's routers alone are disturbed."""
    found = {f"{component.name}/temperature_1": base}
    for name, switched in interventions(component.module, component.blocks):
        if name != "base":
            value = _mean(answered(switched, component.name))
            found[f"{component.name}/{name}"] = drop_top(base, value) if name in DROPS else value
    return found


def _mean(right: Bools) -> float:
    return in_range("accuracy", float(right.mean()), 0.0, 1.0)
