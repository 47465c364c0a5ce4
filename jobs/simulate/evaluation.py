"""Evaluations, probes and initial weights without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jobs.data.spans import Spans
from jobs.evaluate.prefix_tree import Ints, Schedule, Scored, cut, plan
from jobs.evaluate.scoring import Model as Callee
from jobs.evaluate.scoring import Scorer, _Tally, batch_tokens
from jobs.evaluate.state import PRECISIONS, scoring_dtypes
from jobs.models.backbones import CausalLM
from jobs.models.building import drawn_weights, empty_model
from jobs.models.weights import materialise
from jobs.moe.block import dense_width
from jobs.probe.sets import TOKENS_A_BATCH, TokenBatch, routings_of
from jobs.simulate.answer import Answer, counted
from jobs.simulate.ledger import HOST, Ledger
from jobs.simulate.sight import asked_about_pictures, made_sight, probed_with_pictures
from jobs.simulate.training import without_values
from jobs.simulate.world import Weights, simulated
from orchestrator.spec.model import Model
from orchestrator.spec.resolve import text_part

# A request of a task: several answers of so many tokens after a context that fills the window.
ANSWERS, ANSWER_TOKENS = 4, 32
# Tokens of a word or a sentence: no byte depends on how many.
SPAN_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What decides the memory of an evaluation; `reads` are what its suites score, of SuiteKind.reads."""

    model: Model
    vocab_size: int
    max_length: int
    precision: str
    device: str
    reads: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """What decides the memory of making the initial weights; `carried` is what the state has in which they begin."""

    model: Model
    vocab_size: int
    carried: str = ""


class _Counting(Scorer):
    """Tells the ledger how many positions of a pass are scored: their mask has no values."""

    def __init__(self, model: Callee, ledger: Ledger, device: str) -> None:
        super().__init__(model)
        self.device = device
        self._ledger = ledger

    def _forward(self, ids: Tensor, real: Tensor, scored: Sequence[Scored], tally: _Tally, **kwargs: object) -> object:
        places = {(row, int(place)) for row, one in enumerate(scored) for place in one.position}
        self._ledger.chosen = len(places)
        return super()._forward(ids, real, scored, tally, **kwargs)


def simulate_evaluation(asked: Evaluation) -> Answer:
    """Load a state and score the longest requests that a batch may hold, without values."""
    model = empty_model(asked.model, asked.vocab_size)
    dtypes = scoring_dtypes(model, PRECISIONS[asked.precision])
    answer = Answer(parameters=sum(parameter.numel() for parameter in model.parameters()))
    answer.host = 4 * max(parameter.numel() for parameter in model.parameters())  # read one at a time
    with simulated(1) as ledger:
        with ledger.allocating("buffers"):
            without_values(model)
        with ledger.allocating("weights"):
            materialise(model, Weights(model), "cpu", dtypes.__getitem__)
        model.eval()
        answer.moments["start"] = ledger.peak()
        scorer = _Counting(Callee(model, _spans(model)), ledger, asked.device)
        answered = min(ANSWER_TOKENS, asked.max_length - 1)
        room = batch_tokens(asked.model.vocab_size or asked.vocab_size, torch.device(asked.device))
        if "text" in asked.reads:
            rows = max(1, room // asked.max_length)
            text = [_ids(asked.max_length + 1) for _ in range(rows)]
            windows = [(one[:-1], one[1:]) for one in text]
            _scored(ledger, scorer, plan(windows, share=False, tokens_per_batch=room), answer, "text")
            begin = ledger.mark()
            _probed(model, asked.max_length)
            answer.add("routing", ledger.peak(begin))
        if set(asked.reads) & {"tasks", "benchmarks"}:
            rows = max(1, room // asked.max_length)
            requests = []
            for row in range(rows):
                context = _ids(asked.max_length - answered) + row
                pairs = ((context, _ids(answered) + choice) for choice in range(ANSWERS))
                requests += [cut(before, after, asked.max_length) for before, after in pairs]
            share = Callee(model).cacheable
            _scored(ledger, scorer, plan(requests, share=share, tokens_per_batch=room), answer, "tasks")
        if "pictures" in asked.reads:
            ledger.forget_operations()
            begin = ledger.mark()
            tokens = asked_about_pictures(model, asked.max_length, answered)
            _noted(ledger, answer, "pictures", begin, tokens)
        if "shown" in asked.reads:
            begin = ledger.mark()
            probed_with_pictures(model, asked.max_length)
            answer.add("shown", ledger.peak(begin))
    return counted(answer)


def _ids(count: int) -> Ints:
    return np.arange(count, dtype=np.int64)


def _scored(ledger: Ledger, scorer: Scorer, schedule: Schedule, answer: Answer, moment: str) -> None:
    """Score a schedule; the first one's operations are those of a token of evaluation."""
    ledger.forget_operations()
    begin, before = ledger.mark(), scorer.tokens
    scorer.run(schedule)
    _noted(ledger, answer, moment, begin, scorer.tokens - before)


def _noted(ledger: Ledger, answer: Answer, moment: str, begin: int, tokens: int) -> None:
    answer.add(moment, ledger.peak(begin))
    if not answer.operations:
        answer.operations, answer.tokens = ledger.operations.copy(), tokens


@torch.inference_mode()
def _probed(model: CausalLM, length: int) -> None:
    rows = max(1, TOKENS_A_BATCH // length)
    ids = torch.zeros(rows, length, dtype=torch.long)
    routings_of(model, TokenBatch(ids, torch.ones_like(ids), None if _spans(model) is None else ids))


def _spans(model: CausalLM) -> Spans | None:
    """Return what numbers the words or sentences of a sequence, None where routers take tokens."""
    if model.spec.moe.unit == "token":
        return None
    return lambda ids: np.arange(len(ids), dtype=np.int64) // SPAN_TOKENS


def simulate_start(asked: Start) -> Answer:
    """Make initial weights in host memory, one module at a time (a vision side whole) and without values."""
    answer = Answer()
    model = empty_model(asked.model, asked.vocab_size)
    answer.parameters = sum(parameter.numel() for parameter in model.parameters())
    spec = asked.model if asked.model.vision is None else text_part(asked.model)
    language = empty_model(spec, asked.vocab_size)
    sizes = [parameter.numel() for parameter in language.parameters()]
    read = bool(asked.carried or (spec.checkpoint and not spec.upcycle))
    with simulated(1) as ledger:
        with ledger.allocating(HOST):
            for _ in () if read else drawn_weights(language):
                pass
        most, sight = ledger.peak().host, 0
        if asked.model.vision is not None:
            sight = made_sight(ledger, asked.model, asked.vocab_size, carried=asked.carried == "vision")
    if read:
        answer.host = 4 * 2 * max(sizes)  # a tensor, and the checkpoint's that it is put together from
    elif spec.upcycle:
        answer.host = 4 * 3 * spec.hidden_size * dense_width(spec.moe)  # a layer's feed-forward
    answer.host = max(answer.host + most, sight)
    return counted(answer)
