"""Texts generated behind a picture are those of plain decoding: one row, one token at a time, no cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from jobs.evaluate.generation import Generation, generate
from jobs.evaluate.scoring import Model
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from orchestrator.spec.model import MoESpec
from orchestrator.spec.resolve import resolve_moe
from tests.seeing import SEES

VOCABULARY, NEW = 40, 7
PICTURES = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
CONTEXTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10], [1], [5, 6, 7]]


class Numbers:
    """A tokenizer whose text is the ids with blanks between."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{one} " for one in ids)


def plain(model: CausalLM, context: list[int], picture: torch.Tensor) -> str:
    ids = list(context)
    with torch.inference_mode():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids]), images=picture).logits[0, -1].argmax()))
    return Numbers().decode(ids[len(context) :])


def language(kind: str) -> CausalLM:
    spec = SEES
    if kind != "dense":
        moe = resolve_moe(MoESpec(preset="smoe", top_k=2, num_experts=4, expert_width=32))
        if kind == "looks ahead":
            moe = dataclasses.replace(moe, choice="expert", renormalise=False)
        vision = dataclasses.replace(SEES.vision, upcycle="")  # type: ignore[type-var]
        spec = dataclasses.replace(SEES, dense_layers=0, dense_width=0, moe=moe, vision=vision)
    torch.manual_seed(3)
    model = build_model(spec, VOCABULARY).eval()
    with torch.no_grad():  # far apart, so that no two tokens are as likely
        model.backbone.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("kind", ["dense", "experts", "looks ahead"])
@pytest.mark.parametrize("encoded", [False, True])
def test_texts_behind_a_picture_are_those_of_plain_decoding(kind: str, encoded: bool) -> None:
    model, tokenizer = language(kind), Numbers()
    assert model.cacheable == (kind != "looks ahead")
    settings = Generation.of({"temperature": 0}, "", NEW)
    found = []
    for picture in PICTURES.split(1):
        shown = model.vision.encoder(picture)[0].detach() if encoded else picture
        requests = [(context, settings) for context in CONTEXTS]
        texts = generate(Model(model), tokenizer, requests, 2048, shown)
        assert texts == [plain(model, context, picture) for context in CONTEXTS]
        found.append(texts)
    assert found[0] != found[1], "what is shown plays a part"


def test_a_text_ends_at_its_stop() -> None:
    model, tokenizer = language("dense"), Numbers()
    whole = plain(model, CONTEXTS[0], PICTURES[:1])
    third = whole.split()[2]
    settings: Any = Generation.of({"until": [f" {third} "]}, "", NEW)
    (text,) = generate(Model(model), tokenizer, [(CONTEXTS[0], settings)], 0, PICTURES[:1])
    assert text == whole.split(f" {third} ")[0]
