"""Questions about one picture share its encoding, and score as each does alone."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.evaluate.picture_scores import Asked, PictureScorer, outcome_of
from jobs.evaluate.results import Outcome, Scored
from jobs.evaluate.suites.seeing import BLIND, exchanged, summarise
from jobs.models.backbones import CausalLM
from jobs.models.building import build_model
from orchestrator.spec.model import MoESpec
from orchestrator.spec.resolve import before_upcycling, resolve_moe
from tests.seeing import SEES


class Letters:
    """A tokenizer of letters, which puts a begin of text before a prompt."""

    def encode_pairs(self, prompts: list[str], answers: list[str]) -> list[tuple[list[int], list[int]]]:
        ids = {letter: place for place, letter in enumerate(" abcdefghijklmnopqrstuvwxyz?", 2)}
        return [([1, *(ids[x] for x in one)], [ids[x] for x in two]) for one, two in zip(prompts, answers, strict=True)]


def questions(number: int = 20) -> list[Asked]:
    words = ["a cat", "dog", "the red house", "yes"]
    return [
        Asked("t", str(i), "p", f"what is {'ab'[i % 2] * (1 + i % 4)}?", tuple(words[: 2 + i % 3]), i % 2, "base")
        for i in range(number)
    ]


def scored(model: CausalLM, picture: np.ndarray, asked: list[Asked]) -> list[list[float]]:
    tokenizer: Any = Letters()
    scorer = PictureScorer(model, tokenizer, 64)
    return scorer.scores(scorer.features(picture[None])[0], asked)


@pytest.mark.parametrize("language", ["dense", "experts"])
def test_scores_are_those_of_the_plain_path(language: str) -> None:
    spec = SEES if language == "dense" else dataclasses.replace(SEES, dense_layers=0, dense_width=0)
    torch.manual_seed(1)
    model = build_model(spec, 64).eval()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    tokenizer: Any = Letters()
    scorer = PictureScorer(model, tokenizer, 64)
    others = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    found = scorer.scores(scorer.features(np.stack([*others, picture]))[2], questions())
    assert scorer.encoded == 3
    pixels = torch.from_numpy(picture).unsqueeze(0)
    for one, scores in zip(questions(), found, strict=True):
        outcome = outcome_of(one, scores)
        for choice, score in zip(one.choices, scores, strict=True):
            ((prompt, answer),) = tokenizer.encode_pairs([one.prompt], [f" {choice}"])
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logprobs = model(ids, images=pixels).logits[0].log_softmax(-1)
            alone = sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
            assert score == pytest.approx(alone, abs=1e-4)
        assert outcome.acc == float(int(np.argmax(outcome.scores)) == one.label)
        bits = -outcome.scores[one.label] / math.log(2) / len(f" {one.choices[one.label]}")
        assert outcome.answer_bpb == pytest.approx(bits)


def encoder_flops(ask: Callable[[], object]) -> int:
    """Return the FLOPs of the vision encoder while something is asked, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        ask()
    counts = counter.get_flop_counts()
    inside = ("Encoder", "CausalLM.vision.encoder")  # called by itself, or by the model
    return sum(sum(counts[name].values()) for name in inside if name in counts)


def test_one_picture_with_twenty_questions_is_encoded_once() -> None:
    model = build_model(before_upcycling(SEES), 64).eval()
    tokenizer: Any = Letters()
    picture = np.zeros((8, 8, 3), np.uint8)

    def alone() -> None:
        for one in questions():
            for choice in one.choices:
                ((prompt, answer),) = tokenizer.encode_pairs([one.prompt], [f" {choice}"])
                with torch.no_grad():
                    model(torch.tensor([prompt + answer]), images=torch.from_numpy(picture).unsqueeze(0))

    rows = sum(len(one.choices) for one in questions())
    apart = encoder_flops(alone)
    together = encoder_flops(lambda: scored(model, picture, questions()))
    assert apart == rows * together > 0
    assert 20 * together * 5 <= 5 * apart, "at least five times fewer than twenty questions one at a time"
    # By hand: patches, and in each layer four projections and a feed-forward of 16 patches and the class. Of a CPU's
    # attention torch counts nothing.
    tokens, width, hidden = 17, 16, 32
    layer = 2 * tokens * (4 * width * width + 2 * width * hidden)
    assert together == pytest.approx(2 * 16 * 12 * width + 2 * layer, rel=0.05), "positions are interpolated as well"


@pytest.mark.parametrize("language", ["dense", "experts"])
def test_what_is_asked_twice_is_read_once(language: str) -> None:
    spec = SEES if language == "dense" else dataclasses.replace(SEES, dense_layers=0, dense_width=0)
    model = build_model(spec, 64).eval()
    picture = np.zeros((8, 8, 3), np.uint8)
    fed: list[int] = []
    model.backbone.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].numel()))
    same = [dataclasses.replace(one, prompt="what is it?", choices=("a", "bc"), label=0) for one in questions(2)]
    first, second = scored(model, picture, same)
    assert first == second
    # The picture, the prompt of twelve ids behind it, and of two answers all but the last id.
    assert fed == [SEES.vision.tokens, 12, 2 * 2]


def test_routers_that_look_ahead_take_the_plain_path() -> None:
    moe = resolve_moe(MoESpec(preset="smoe", top_k=2, num_experts=4, choice="expert", expert_width=32))
    vision = dataclasses.replace(SEES.vision, upcycle="")  # type: ignore[type-var]
    model = build_model(dataclasses.replace(SEES, dense_layers=0, dense_width=0, moe=moe, vision=vision), 64).eval()
    assert not model.cacheable
    assert len(scored(model, np.zeros((8, 8, 3), np.uint8), questions(2))) == 2


def test_the_plain_path_scores_as_the_shared_one() -> None:
    model = build_model(SEES, 64).eval()
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    shared = scored(model, picture, questions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "cacheable", property(lambda self: False))
        plain = scored(model, picture, questions())
    for one, other in zip(shared, plain, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_baseline_is_that_of_the_same_questions() -> None:
    rows = [Scored("s/t", str(i), 0, Outcome((0.0, -1.0), float(i % 2), 0.0, 1.0)) for i in range(4)]
    rows += [Scored("s/t", str(i), 0, Outcome((0.0, -1.0), float(i == 0), 0.0, 1.0), BLIND) for i in range(4)]
    table = summarise(rows, {"s/t": 2})
    assert table.metrics == {"s/t/acc": 0.5, "s/t/blind_acc": 0.25, "s/t/sight": 0.25, "s/t/answer_bpb": 1.0}
    assert table.chance == {"s/t/acc": 0.5, "s/t/blind_acc": 0.5}


@pytest.mark.parametrize("common", [0.0, 0.4, 0.7])
def test_blind_questions_see_pictures_of_other_answers(common: float) -> None:
    dice = random.Random(3)
    answers = ["a" if dice.random() < common else dice.choice("bcde") for _ in range(61)]
    pictures = [f"{place}.png" for place in range(61)]
    found = exchanged(answers, pictures)
    assert sorted(found) == list(range(61))
    assert all(place != other for place, other in enumerate(found))
    equal = sum(answers[place] == answers[other] for place, other in enumerate(found))
    assert equal == max(0, 2 * max(map(answers.count, answers)) - 61), "those that no exchange can avoid"


def test_yes_and_no_about_one_picture_are_exchanged_for_another() -> None:
    pictures = [f"{place // 2}.png" for place in range(20)]
    found = exchanged(["yes", "no"] * 10, pictures)
    assert sorted(found) == list(range(20))
    for place, other in enumerate(found):
        assert pictures[place] != pictures[other]
        assert (place - other) % 2 == 1
    assert exchanged(["yes"], ["a"]) == [0]
    assert exchanged([], []) == []
