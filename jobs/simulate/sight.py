"""What a model sees with, without values: questions about pictures, and the memory in which a vision side is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from jobs.data.packing import Batch
from jobs.evaluate.picture_scores import Asked, PictureScorer, rows_of_pass
from jobs.evaluate.suites.seeing import PICTURES_A_PART
from jobs.evaluate.suites.seeing_probe import ROWS_A_BATCH, Questions
from jobs.models.backbones import CausalLM
from jobs.models.building import empty_model
from jobs.models.vision.sight import carried_sight
from jobs.probe.sets import routings_of
from jobs.simulate.ledger import HOST, Ledger
from jobs.simulate.training import NoText
from jobs.simulate.world import Weights
from orchestrator.spec.model import Model
from orchestrator.spec.resolve import before_upcycling, sighted
from orchestrator.spec.vision import PIXELS


class Longest:
    """Gives every question and answer ids that fill the window together, no two questions the same ones."""

    def __init__(self, max_length: int, answer: int) -> None:
        self._prompt, self._answer = max_length - answer, answer

    def encode_pairs(self, prompts: list[str], responses: list[str]) -> list[tuple[list[int], list[int]]]:
        """Return (ids of a question, ids of its answer) of each pair."""
        return [([number] * self._prompt, [number] * self._answer) for number in range(len(prompts))]


class HeldOut:
    """Held-out questions as long as the window."""

    def __init__(self, model: Model, length: int) -> None:
        self._source = NoText(length, sighted(model), images=PIXELS)

    def of_rows(self, rows: Sequence[int]) -> Batch:
        """Return as many questions as there are rows."""
        return self._source.micro_batch(0, 0, len(rows))


def asked_about_pictures(model: CausalLM, max_length: int, answer_tokens: int) -> int:
    """Encode a part's pictures and score as many questions as the decoder takes at a time; return their tokens."""
    choices, side = rows_of_pass(max_length, model.vocab_size), sighted(model.spec).image_size
    asked = Asked("task", "", "picture", "question", ("answer",) * choices, 0, "base")
    scorer = PictureScorer(model, Longest(max_length, answer_tokens), max_length)
    features = scorer.features(np.zeros((PICTURES_A_PART, side, side, 3), dtype=np.uint8))
    scorer.scores(features[0], [asked])
    return choices * max_length


@torch.inference_mode()
def probed_with_pictures(model: CausalLM, max_length: int) -> None:
    """Answer one batch of held-out questions and look at its routing, as the suite `seeing_probe` does."""
    rows = list(range(ROWS_A_BATCH))
    questions = Questions(HeldOut(model.spec, max_length), [""] * len(rows))
    questions.answered(model, "cpu")
    routings_of(model, questions.tokens(rows, "cpu"))


def made_sight(ledger: Ledger, model: Model, vocab_size: int, *, carried: bool) -> int:
    """Return the bytes of host memory in which a vision side is made; `carried`: out of a state's dense one."""
    vision, before = sighted(model), empty_model(before_upcycling(model), vocab_size)
    drawn = dataclasses.replace(model, vision=dataclasses.replace(vision, checkpoint=""))
    begin = ledger.mark()
    with ledger.allocating(HOST):
        for _ in carried_sight(drawn, sighted(drawn), Weights(before) if carried else {}, 0, 0):
            pass
    most = ledger.peak(begin).host
    if carried or not vision.checkpoint:
        return most
    assert before.vision is not None
    # What is read of a checkpoint lies beside the encoder until all of it is there.
    sizes = [parameter.nbytes for parameter in before.vision.parameters()]
    return max(most, sum(sizes) + sum(parameter.nbytes for parameter in before.vision.encoder.parameters()))
