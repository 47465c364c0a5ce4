"""Word and sentence spans of token sequences, for routers that give a whole span one assignment.

Boundaries are a function of the token and of earlier tokens only, so a changed ending never moves an earlier boundary
and a cached prefix stays valid. They come from a table over the vocabulary, made from the tokenizer's own strings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Ids = NDArray[np.integer]
Spans = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # token ids -> span numbers of a whole sequence

_STOPS = (".", "!", "?", "…", "。", "！", "？")
_CLOSERS = "\"'”’)]}»`*_"


@dataclass(frozen=True, slots=True)
class SpanTables:
    """What each token does to spans, [V] each."""

    opens_word: Flags  # the token starts with white space
    closes_word: Flags  # the token ends with white space: the next one starts a word
    stops: Flags  # the token ends with a full stop, an exclamation or a question mark, quotes aside
    transparent: Flags  # only closing quotes, brackets, white space: a sentence that ended before has still ended
    breaks: Flags  # a line break or a special token: the next token starts a sentence
    blank: Flags  # nothing but white space: it belongs to the span before it
    special: Flags  # a token of its own: starts a span and ends it

    @classmethod
    def build(cls, strings: list[str], special: set[int]) -> SpanTables:
        """Make the tables from the decoded string of every token id, and the ids of special tokens."""
        bare = [string.rstrip().rstrip(_CLOSERS) for string in strings]

        def flags(values: list[bool]) -> Flags:
            return np.array(values, dtype=bool)

        return cls(
            opens_word=flags([string[:1].isspace() for string in strings]),
            closes_word=flags([string[-1:].isspace() for string in strings]),
            stops=flags([text.endswith(_STOPS) for text in bare]),
            transparent=flags([bool(s) and not text for s, text in zip(strings, bare, strict=True)]),
            breaks=flags([i in special or "\n" in string for i, string in enumerate(strings)]),
            blank=flags([bool(string) and not string.strip() for string in strings]),
            special=flags([i in special for i in range(len(strings))]),
        )

    def save(self, path: Path) -> None:
        """Write the tables as one `.npy` array [7, V]."""
        np.save(path, np.stack([getattr(self, name) for name in self.__slots__]))

    @classmethod
    def load(cls, path: Path) -> SpanTables:
        """Read what `save` wrote."""
        return cls(*np.load(path, allow_pickle=False))

    def word_starts(self, ids_T: Ids) -> Flags:
        """Return which tokens start a word, [T]; the first one always does."""
        starts = self.opens_word[ids_T] | self.special[ids_T]
        starts[1:] |= (self.closes_word | self.special)[ids_T[:-1]]
        starts &= ~self.blank[ids_T]
        starts[:1] = True
        return starts

    def sentence_starts(self, ids_T: Ids) -> Flags:
        """Return which tokens start a sentence, [T]; the first one always does."""
        starts = np.zeros(len(ids_T), dtype=bool)
        starts[:1] = True
        # The last token that is not a mere quote, bracket or space decides whether a sentence has ended.
        places = np.where(self.transparent[ids_T], 0, np.arange(len(ids_T)))
        deciding = ids_T[np.maximum.accumulate(places)] if len(ids_T) else ids_T
        ended = self.stops[deciding[:-1]] & (self.opens_word[ids_T[1:]] | self.closes_word[ids_T[:-1]])
        starts[1:] = (ended | self.breaks[ids_T[:-1]]) & ~self.blank[ids_T[1:]] | self.special[ids_T[1:]]
        return starts

    def spans(self, ids_T: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the word and the sentence number of each token, [T] each, counted from 0."""
        words, sentences = self.word_starts(ids_T), self.sentence_starts(ids_T)
        return np.cumsum(words) - 1, np.cumsum(sentences) - 1
