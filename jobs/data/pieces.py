"""A BPE over characters in the manner of SentencePiece (Kudo and Richardson 2018): spaces are part of the words.

Every text is kept as it is (no normalisation), a text begins as a word does, and a character that is no token of its
own is written as its bytes, so that no text is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

MARK = "\u2581"  # a space
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
# Of the tokens that are no bytes at most this share are single characters: rarer ones are bytes.
CHARACTER_SHARE = 0.25


def train_pieces(texts: Iterator[str], vocab_size: int, special: Sequence[str]) -> Any:
    """Return a tokenizer (of the tokenizers library) with at most `vocab_size` tokens: equal texts give equal merges.

    Ids: the special tokens, the 256 bytes, then characters and merges. `vocab_size` exceeds both together.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    marks = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    words = pre_tokenizers.Split(MARK, "merged_with_next")
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = marks, words
    learned = vocab_size - len(BYTES)
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(special),
        limit_alphabet=max(1, int(CHARACTER_SHARE * learned)),
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    order = [*special, *BYTES, *pieces[len(special) :]]
    vocabulary = {piece: index for index, piece in enumerate(order)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = marks, words
    steps = (decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(list(steps))
    tokenizer.add_special_tokens(list(special))
    return tokenizer
