"""A committed state as something that can be scored: model, tokenizer and harness model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.data.spans import Spans
from jobs.data.tokenizer import Vocabulary, Words
from jobs.models.backbones import CausalLM
from jobs.models.building import empty_model
from jobs.models.roles import parameter_roles
from jobs.models.shards import fetch_shards
from jobs.models.weights import materialise
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.node.context import StageContext
    from orchestrator.spec.work import EvaluateWork, GenerateWork

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class State:
    """The evaluated state: its model in scoring precision, and the tokenizer it was trained with."""

    model: CausalLM
    tokenizer: Words
    tokenizer_directory: Path
    spans: Spans | None


def load_state(context: StageContext, work: EvaluateWork | GenerateWork) -> State:
    """Build the model of `work`, load its weights and put it on the job's device; MoegridError on a bad precision.

    The state that the job's last evaluation loaded is used again: its suites share one model.
    """
    asked = (work.state, work.tokenizer, work.precision)
    live = context.job.live
    if live.get("evaluated", ((), None))[0] == asked:
        known: State = live["evaluated"][1]
        return known
    live.pop("evaluated", None)  # one model at a time

    if work.precision not in PRECISIONS:
        raise MoegridError(f"scoring precision {work.precision!r} is unknown", hint=f"use {' or '.join(PRECISIONS)}")
    directory = context.directory(work.tokenizer)
    tokenizer = Words(directory)
    model = empty_model(work.model, int(context.manifest(work.tokenizer).info["vocab_size"]))
    dtypes = scoring_dtypes(model, PRECISIONS[work.precision])
    materialise(model, fetch_shards(context, work.state, "weights"), context.execution.device, dtypes.__getitem__)
    model.eval()
    state = State(model, tokenizer, directory, span_function(model, directory))
    live["evaluated"] = (asked, state)
    return state


def scoring_dtypes(model: CausalLM, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the type of every weight when scoring in `dtype`: routers, which decide routing, stay in fp32.

    Buffers (their biases and thresholds, rotary tables) are not weights and stay in fp32 too.
    """
    return {name: torch.float32 if role == "router" else dtype for name, _, role in parameter_roles(model)}


def span_function(model: CausalLM, tokenizer_directory: Path) -> Spans | None:
    """Return what numbers the spans of a token sequence for a word or sentence router, None for other routers."""
    unit = model.spec.moe.unit
    if unit not in ("word", "sentence"):
        return None
    tables = Vocabulary.load(tokenizer_directory).span_tables()
    kind = ("word", "sentence").index(unit)
    return lambda ids: tables.spans(ids)[kind]
