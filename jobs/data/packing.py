"""Loaders of the tokens artifact: a micro-batch is a pure function of (seed, step, index), so a resume needs no state.

Labels are already shifted: `labels[b, t]` is the token that follows `input_ids[b, t]`, or -100 where there is no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.mixtures import ROUND
from orchestrator.errors import SourceError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, [B, S] each: ids, shifted labels (-100 = no loss), mask (1 = real), span numbers per row.

    `images` are one picture a row: pixels [B, H, W, 3] uint8, or features [B, P, D] of a frozen encoder.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    spans_word: Tensor
    spans_sentence: Tensor
    images: Tensor | None = None

    def spans(self, unit: str | None) -> Tensor | None:
        """Return the spans that a router of words or of sentences pools, None for one of tokens."""
        return {"word": self.spans_word, "sentence": self.spans_sentence}.get(unit or "")


class Batches(Protocol):
    """A source of micro-batches."""

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return micro-batch `index` (0 <= index < accumulation) of optimizer step `step` with `size` rows."""
        ...


def open_batches(
    data_format: str,
    directory: Path,
    sequence_length: int,
    seed: int,
    *,
    accumulation: int = 1,
    loss: str = "all",
    pad: int = 0,
    corpora: Corpora = (),
    features: Path | None = None,
) -> Batches:
    """Return the loader of a tokens artifact of format `text` or `instruction`, mixed from `corpora` if it has any.

    `features` are what a frozen encoder made of its pictures, which then stand in the pixels' place.
    """
    if data_format == "text":
        return TextBatches(directory, sequence_length, seed, accumulation=accumulation, corpora=corpora)
    return InstructionBatches(
        directory,
        sequence_length,
        seed,
        accumulation=accumulation,
        loss=loss,
        pad=pad,
        corpora=corpora,
        features=features,
    )


class _Order:
    """A seeded shuffle of `count` rows, another one in each epoch, read at any position; `salt` is a corpus's own."""

    def __init__(self, count: int, seed: int, salt: tuple[int, ...] = ()) -> None:
        self._count = count
        self._seed = seed
        self._salt = salt
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.shift = 0.0

    def row(self, position: int) -> tuple[int, float]:
        """Return (row, epoch's shift in [0, 1)) at a position of the endless sequence."""
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch, *self._salt]))
            self.shift = float(generator.random())
            self._order = generator.permutation(self._count)
            self._epoch = epoch
        return int(self._order[place]), self.shift


# (first, end, share) of each corpus: in tokens of text, in examples of instructions.
Corpora = Sequence[tuple[int, int, float]]


class _Turns:
    """Whose turn it is at a position of the endless sequence of windows: every corpus has its share of each stretch.

    The j-th window of a corpus of which a round holds q comes at (j + 1/2) / q of the round, so that a stretch of any
    length differs by about one window from its shares. A round is as long as the shares are exact.
    """

    def __init__(self, shares: Sequence[float], length: int = ROUND) -> None:
        exact = [share * length for share in shares]
        quotas = [int(value) for value in exact]
        by_rest = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
        for i in by_rest[: length - sum(quotas)]:
            quotas[i] += 1
        self._quotas = quotas
        times = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
        owners = np.repeat(np.arange(len(quotas)), quotas)
        order = np.argsort(times, kind="stable")
        self._owner = owners[order]
        self._nth = np.concatenate([np.arange(quota) for quota in quotas])[order]

    def at(self, position: int) -> tuple[int, int]:
        """Return (corpus, how many windows of it came before) at a position."""
        rounds, place = divmod(position, len(self._owner))
        corpus = int(self._owner[place])
        return corpus, rounds * self._quotas[corpus] + int(self._nth[place])


class _Parts:
    """The rows of a tokens artifact in the order in which they are trained on, as (part, row in it, shift).

    `counts` are the rows of each part: of the whole artifact, or of its corpora with their `shares`.
    """

    def __init__(self, counts: Sequence[int], seed: int, shares: Sequence[float] = ()) -> None:
        self._turns = _Turns(shares) if shares else None
        salts: list[tuple[int, ...]] = [(i + 1,) for i in range(len(counts))] if shares else [()]
        self._orders = [_Order(count, seed, salt) for count, salt in zip(counts, salts, strict=True)]

    def rows(self, first: int, size: int) -> list[tuple[int, int, float]]:
        """Return the rows at the positions [first, first + size) of the endless sequence."""
        turns = [self._turns.at(at) if self._turns else (0, at) for at in range(first, first + size)]
        return [(part, *self._orders[part].row(nth)) for part, nth in turns]


def _first(step: int, index: int, size: int, accumulation: int) -> int:
    if not 0 <= index < accumulation:
        raise ValueError(f"micro-batch {index} of a step that has {accumulation}")
    return (step * accumulation + index) * size


def _load(directory: Path, split: str, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(directory / f"{split}_{name}.npy", mmap_mode="r", allow_pickle=False)
    return array


def pictures(directory: Path, split: str, features: Path | None = None) -> Callable[[Sequence[int]], Tensor] | None:
    """Return what gives the pictures of rows, [n, H, W, 3] or [n, P, D]; None where the data have none."""
    if not (directory / f"{split}_pictures.npy").is_file():
        return None
    of_rows = _load(directory, split, "pictures")
    stored: NDArray[Any] = np.load(features or directory / "pixels.npy", mmap_mode="r", allow_pickle=False)
    return lambda rows: torch.from_numpy(np.stack([stored[of_rows[row]] for row in rows]))


class TextBatches:
    """Windows of `sequence_length` tokens of the stream, each once an epoch, shuffled; the cut moves every epoch."""

    def __init__(
        self,
        directory: Path,
        sequence_length: int,
        seed: int,
        *,
        accumulation: int = 1,
        split: str = "train",
        corpora: Corpora = (),
    ) -> None:
        self._tokens = _load(directory, split, "tokens")
        self._words = _load(directory, split, "spans_word")
        self._sentences = _load(directory, split, "spans_sentence")
        self._length = sequence_length
        self._accumulation = accumulation
        parts = [(first, end) for first, end, _ in corpora] or [(0, len(self._tokens))]
        self._starts = [first for first, _ in parts]
        windows = [(end - first - sequence_length) // sequence_length for first, end in parts]
        self.windows = sum(windows)
        if min(windows) < 1:
            least = min(end - first for first, end in parts)
            raise SourceError(
                f"{least} tokens are too few for sequences of {sequence_length}",
                hint="raise data.rows or lower sequence_length",
            )
        self._parts = _Parts(windows, seed, [share for *_, share in corpora])

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return micro-batch `index` of optimizer step `step`: `size` windows, no padding."""
        rows = self._parts.rows(_first(step, index, size, self._accumulation), size)
        starts = [
            self._starts[part] + window * self._length + int(shift * self._length) for part, window, shift in rows
        ]
        ids = np.stack([self._tokens[start : start + self._length + 1] for start in starts]).astype(np.int64)
        tokens = torch.from_numpy(ids)
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            torch.ones(size, self._length, dtype=torch.long),
            self._spans(self._words, starts),
            self._spans(self._sentences, starts),
        )

    def _spans(self, begins: NDArray[Any], starts: list[int]) -> Tensor:
        flags = np.stack([begins[start : start + self._length] for start in starts])
        flags[:, 0] = True
        return torch.from_numpy(np.cumsum(flags, axis=1) - 1)


class InstructionBatches:
    """Prompt and response examples, each once an epoch, shuffled, padded on the right to the micro-batch's longest."""

    def __init__(
        self,
        directory: Path,
        sequence_length: int,
        seed: int,
        *,
        accumulation: int = 1,
        split: str = "train",
        loss: str = "response",
        pad: int = 0,
        corpora: Corpora = (),
        features: Path | None = None,
    ) -> None:
        self._tokens = _load(directory, split, "tokens")
        self._pictures = pictures(directory, split, features)
        self._offsets = _load(directory, split, "offsets")
        self._mask = _load(directory, split, "loss_mask")
        self._words = _load(directory, split, "spans_word")
        self._sentences = _load(directory, split, "spans_sentence")
        self._length = sequence_length
        self._accumulation = accumulation
        self._everywhere = loss == "all"
        self._pad = pad
        self.examples = len(self._offsets) - 1
        if self.examples < 1:
            raise SourceError("the data has no examples", hint="check data.rows and data.holdout")
        parts = [(first, end) for first, end, _ in corpora] or [(0, self.examples)]
        self._firsts = [first for first, _ in parts]
        self._parts = _Parts([end - first for first, end in parts], seed, [share for *_, share in corpora])

    def micro_batch(self, step: int, index: int, size: int) -> Batch:
        """Return micro-batch `index` of optimizer step `step`: `size` examples."""
        found = self._parts.rows(_first(step, index, size, self._accumulation), size)
        return self.of_rows([self._firsts[part] + row for part, row, _ in found])

    def of_rows(self, rows: Sequence[int]) -> Batch:
        """Return these examples as one batch."""
        size = len(rows)
        # An example longer than the model's window keeps its end: that is where the response is.
        cuts = [
            slice(max(self._offsets[row], self._offsets[row + 1] - self._length - 1), self._offsets[row + 1])
            for row in rows
        ]
        longest = max(cut.stop - cut.start for cut in cuts) - 1
        ids = np.full((size, longest), self._pad, dtype=np.int64)
        labels = np.full((size, longest), IGNORED, dtype=np.int64)
        mask = np.zeros((size, longest), dtype=np.int64)
        spans = np.zeros((2, size, longest), dtype=np.int64)
        for row, cut in enumerate(cuts):
            tokens = self._tokens[cut].astype(np.int64)
            length = len(tokens) - 1
            ids[row, :length] = tokens[:-1]
            mask[row, :length] = 1
            wanted = np.ones(length, dtype=bool) if self._everywhere else self._mask[cut][1:]
            labels[row, :length] = np.where(wanted, tokens[1:], IGNORED)
            for kind, begins in enumerate((self._words, self._sentences)):
                flags = np.array(begins[cut][:-1])
                flags[:1] = True
                spans[kind, row, :length] = np.cumsum(flags) - 1
        images = None if self._pictures is None else self._pictures(rows)
        ids_BS, labels_BS, mask_BS, words, sentences = map(torch.from_numpy, (ids, labels, mask, spans[0], spans[1]))
        return Batch(ids_BS, labels_BS, mask_BS, words, sentences, images)
