"""A tiny model that sees, and a store with pictures whose brightness is the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from orchestrator.plan.phases import encoder_of
from orchestrator.spec.cell import DataSpec, TrainSpec
from orchestrator.spec.model import Model, ModelSpec, MoESpec
from orchestrator.spec.resolve import before_upcycling, resolve_model, text_part
from orchestrator.spec.vision import VisionSpec
from orchestrator.spec.work import Conditions, FeaturesWork, InitWork, TrainWork
from orchestrator.store import Store
from tests.training import TOKENIZER, TRAIN, _npy, key, prepare, put

VISION = VisionSpec(
    image_size=8,
    patch_size=2,
    positions=3,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    width=32,
    connector_width=24,
)
SEES = resolve_model(
    ModelSpec(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        context=32,
        dense_layers=2,
        dense_width=64,
        vision=VISION,
        moe=MoESpec(preset="smoe", top_k=3, num_experts=6, expert_width=32),
    )
)
PICTURES = 40
LEARN = dataclasses.replace(
    TRAIN, data=DataSpec("", format="vision"), loss="response", steps=8, sequence_length=16, expert_dropout=0.0
)


def prepare_pictures(url: str) -> Store:
    """Return `tests.training.prepare`'s store with pictures, each asked about twice."""
    store = prepare(url)
    generator = np.random.default_rng(1)
    bright = generator.integers(0, 2, PICTURES)
    pixels = (generator.integers(0, 60, (PICTURES, 8, 8, 3)) + 190 * bright[:, None, None, None]).astype(np.uint8)
    rows = 2 * PICTURES
    tokens = np.tile(np.arange(6), (rows, 1))
    tokens[:, 4] = 10 + bright[np.arange(rows) % PICTURES]
    flat = tokens.reshape(-1)
    starts = np.ones(len(flat), dtype=bool)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "tokens": flat.astype(np.uint16),
        "offsets": np.arange(0, len(flat) + 1, 6),
        "loss_mask": np.arange(len(flat)) % 6 >= 4,
        "spans_word": starts,
        "spans_sentence": starts,
        "pictures": np.arange(rows) % PICTURES,
    }
    blobs = {f"train_{name}.npy": _npy(array) for name, array in arrays.items()}
    put(store, "pictures", "tokens", blobs | {"pixels.npy": _npy(pixels)}, {"pad": 0})
    return store


def features_work() -> FeaturesWork:
    """Return what makes the features of the pictures."""
    return FeaturesWork(encoder_of(VISION), key("pictures"), 0)


def phase(
    name: str, model: Model, init: InitWork, cuts: list[int], train: TrainSpec = LEARN, *, features: str = ""
) -> list[TrainWork]:
    """Return the works of a phase that begins in `init`, cut at these steps."""
    conditions = Conditions(name, train, key("pictures"), 0, 0, features)
    works: list[TrainWork] = []
    for start, stop in zip([0, *cuts], [*cuts, train.steps], strict=True):
        history = works[-1].spans if works else ()
        works.append(TrainWork(model, TOKENIZER, init.key(), history, conditions, start, stop))
    return works


def chain(model: Model = SEES, cuts: dict[str, list[int]] | None = None) -> list[InitWork | FeaturesWork | TrainWork]:
    """Return a cell's works: text weights, features, align with a frozen encoder and language model, instruct."""
    cuts = cuts or {}
    text = InitWork(text_part(model), TOKENIZER, 0)
    dense = before_upcycling(model)
    seen = InitWork(dense, TOKENIZER, 0, "", text.key())
    features = features_work()
    frozen = dataclasses.replace(LEARN, freeze="language+vision")
    align = phase("align", dense, seen, cuts.get("align", []), frozen, features=features.key())
    sparse = InitWork(model, TOKENIZER, 0, "", align[-1].key())
    instruct = phase("instruct", model, sparse, cuts.get("instruct", []))
    return [text, features, seen, *align, sparse, *instruct]
