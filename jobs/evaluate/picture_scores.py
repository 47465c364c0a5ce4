"""Log-likelihoods of answers to questions about a picture, which is encoded once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.data.tokenizer import Vocabulary
from jobs.evaluate.results import Outcome
from jobs.models.backbones import CausalLM
from orchestrator.data.local_data import joined

# Rows of one pass of the decoder.
ROWS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one picture, with its choices and which of them is right."""

    task: str
    id: str
    picture: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    intervention: str


class PictureScorer:
    """Scores questions about pictures; `encoded` counts the pictures that went through the encoder."""

    def __init__(self, model: CausalLM, vocabulary: Vocabulary, max_length: int) -> None:
        self._model, self._vocabulary, self._max_length = model, vocabulary, max_length
        self._device = next(model.parameters()).device
        self.encoded = 0

    @torch.no_grad()
    def outcomes(self, pixels_HWC: NDArray[np.uint8], questions: Sequence[Asked]) -> list[Outcome]:
        """Return what the likelihoods of each question's choices mean; the picture is encoded once for all of them."""
        assert self._model.vision is not None
        image = torch.from_numpy(np.array(pixels_HWC)).unsqueeze(0).to(self._device)
        features, _ = self._model.vision.encoder(image)
        self.encoded += 1
        prompts = [one.prompt for one in questions for _ in one.choices]
        answers = [joined(one.prompt, choice) for one in questions for choice in one.choices]
        rows = [self._cut(*pair) for pair in self._vocabulary.encode_pairs(prompts, answers)]
        scores = [
            one for first in range(0, len(rows), ROWS) for one in self._scores(features, rows[first : first + ROWS])
        ]
        found, place = [], 0
        for one in questions:
            end = place + len(one.choices)
            found.append(_outcome(one.label, scores[place:end], answers[place:end]))
            place = end
        return found

    def _cut(self, prompt: list[int], answer: list[int]) -> tuple[list[int], int]:
        """Return (ids, how many of them are the answer's): a long prompt loses its beginning."""
        return (prompt + answer)[-self._max_length :], min(len(answer), self._max_length - 1)

    def _scores(self, features: Tensor, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        """Return the log-likelihood of each row's answer behind the picture, which the decoder reads once."""
        longest = max(len(ids) for ids, _ in rows)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=self._device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows], device=self._device)
        if self._model.cacheable:
            cache = self._model(padded[:1, :0], images=features, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(rows))
            whole = torch.cat([mask.new_ones(len(rows), cache.get_seq_length()), mask], 1)
            logits = self._model(padded, attention_mask=whole, past_key_values=cache, use_cache=True).logits
        else:
            logits = self._model(padded, attention_mask=mask, images=features.expand(len(rows), -1, -1)).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, padded[:, 1:, None]).squeeze(-1)
        return [
            float(row[len(ids) - 1 - own : len(ids) - 1].double().sum())
            for row, (ids, own) in zip(logprobs, rows, strict=True)
        ]


def _outcome(label: int, scores: Sequence[float], answers: Sequence[str]) -> Outcome:
    """Return an item's outcome; of equal scores the first choice counts, as in lm-eval."""
    by_length = [score / len(answer) for score, answer in zip(scores, answers, strict=True)]
    bits = -scores[label] / math.log(2) / len(answers[label].encode())
    right, right_by_length = (float(int(np.argmax(values)) == label) for values in (scores, by_length))
    return Outcome(tuple(scores), right, right_by_length, bits)
