"""Log-likelihoods of answers to questions about a picture, which is encoded once for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.evaluate.results import Outcome
from jobs.evaluate.scoring import LARGEST_LOGITS
from jobs.models.backbones import CausalLM
from orchestrator.data.local_data import joined

# Rows of one pass of the decoder, as far as their logits may be held at once.
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


def rows_of_pass(length: int, vocabulary: int) -> int:
    """Return how many rows of so many tokens the decoder reads at a time."""
    return max(1, min(ROWS, LARGEST_LOGITS // (length * vocabulary)))


class Pairs(Protocol):
    """What gives the ids of questions and answers, as `jobs.data.tokenizer.Vocabulary` does."""

    def encode_pairs(self, prompts: list[str], responses: list[str]) -> list[tuple[list[int], list[int]]]: ...


Row = tuple[tuple[int, ...], tuple[int, ...]]


class PictureScorer:
    """Scores questions about pictures; `encoded` counts the pictures that went through the encoder."""

    def __init__(self, model: CausalLM, vocabulary: Pairs, max_length: int) -> None:
        self._model, self._vocabulary, self._max_length = model, vocabulary, max_length
        self._device = next(model.parameters()).device
        self.encoded = 0

    @torch.no_grad()
    def features(self, pixels_BHWC: NDArray[np.uint8]) -> Tensor:
        """Return what the encoder makes of pictures that go through it side by side, [B,P,D]."""
        assert self._model.vision is not None
        made: Tensor = self._model.vision.encoder(torch.from_numpy(pixels_BHWC).to(self._device))[0]
        self.encoded += len(pixels_BHWC)
        return made

    @torch.no_grad()
    def scores(self, features_PD: Tensor, questions: Sequence[Asked]) -> list[list[float]]:
        """Return the log-likelihoods of each question's choices behind one picture.

        A question that is asked twice is read once, and so is the beginning that its answers share.
        """
        features = features_PD.unsqueeze(0)
        prompts = [one.prompt for one in questions for _ in one.choices]
        answers = [joined(one.prompt, choice) for one in questions for choice in one.choices]
        rows = [self._cut(*pair) for pair in self._vocabulary.encode_pairs(prompts, answers)]
        known: dict[Row, float] = {}
        different = sorted(set(rows))
        score = self._behind if self._model.cacheable else self._plain
        size = rows_of_pass(max(len(prompt) + len(answer) for prompt, answer in different), self._model.vocab_size)
        if self._model.by_length:
            size = 1
        for first in range(0, len(different), size):
            batch = different[first : first + size]
            known |= zip(batch, score(features, batch), strict=True)
        found = iter([known[row] for row in rows])
        return [[next(found) for _ in one.choices] for one in questions]

    def _cut(self, prompt: list[int], answer: list[int]) -> Row:
        """Return (ids before the answer, the answer's): a long prompt loses its beginning."""
        ids, own = (prompt + answer)[-self._max_length :], min(len(answer), self._max_length - 1)
        return tuple(ids[: len(ids) - own]), tuple(ids[len(ids) - own :])

    def _behind(self, features: Tensor, rows: Sequence[Row]) -> list[float]:
        """Return each row's log-likelihood of its answer: picture, questions and answers are read in turn, once."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
        of_row = torch.tensor([prompts.index(prompt) for prompt, _ in rows], device=self._device)
        asked, real = _padded(prompts, self._device)
        cache = self._model(asked[:1, :0], images=features, use_cache=True).past_key_values
        seen = cache.get_seq_length()
        cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([real.new_ones(len(prompts), seen), real], 1)
        lengths = real.sum(1)
        last = torch.arange(asked.shape[1], device=self._device)[None] == lengths[:, None] - 1
        after = self._model(
            asked, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=last
        ).logits[of_row]
        answers, own = _padded([answer for _, answer in rows], self._device)
        logits = after.unsqueeze(1)
        if answers.shape[1] > 1:
            cache.batch_select_indices(of_row)
            places = seen + lengths[of_row, None] + torch.arange(answers.shape[1] - 1, device=self._device)
            rest = self._model(
                answers[:, :-1],
                attention_mask=torch.cat([mask[of_row], own[:, :-1]], 1),
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            ).logits
            logits = torch.cat([logits, rest], 1)
        return _summed(logits, answers, own)

    def _plain(self, features: Tensor, rows: Sequence[Row]) -> list[float]:
        """Return the same where later tokens may change what earlier ones do: every row is read as a whole."""
        ids, mask = _padded([prompt + answer for prompt, answer in rows], self._device)
        logits = self._model(ids, attention_mask=mask, images=features.expand(len(rows), -1, -1)).logits
        answers, own = _padded([answer for _, answer in rows], self._device)
        first = torch.tensor([len(prompt) - 1 for prompt, _ in rows], device=self._device)
        places = (first[:, None] + torch.arange(answers.shape[1], device=self._device)).clamp(max=ids.shape[1] - 1)
        picked = logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[-1]))
        return _summed(picked, answers, own)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [B,S] with padding behind them, and 1 where they are real."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device)[None] < lengths[:, None]).long()


def _summed(logits_BSV: Tensor, answers_BS: Tensor, own_BS: Tensor) -> list[float]:
    """Return each row's summed log-likelihood of its real answer tokens."""
    logprobs = torch.log_softmax(logits_BSV.float(), -1).gather(-1, answers_BS[:, :, None]).squeeze(-1)
    summed: list[float] = (logprobs.double() * own_BS).sum(1).tolist()
    return summed


def outcome_of(one: Asked, scores: Sequence[float]) -> Outcome:
    """Return what the likelihoods of a question's choices mean; of equal ones the first counts, as in lm-eval."""
    answers = [joined(one.prompt, choice) for choice in one.choices]
    label = one.label
    by_length = [score / len(answer) for score, answer in zip(scores, answers, strict=True)]
    bits = -scores[label] / math.log(2) / len(answers[label].encode())
    right, right_by_length = (float(int(np.argmax(values)) == label) for values in (scores, by_length))
    return Outcome(tuple(scores), right, right_by_length, bits)
