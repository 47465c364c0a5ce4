"""The tokenizer stage: a BPE trained on the training documents, or a tokenizer taken from a checkpoint.

Blobs: `tokenizer.json` (the tokenizers library's format) and `special.json` (bos, eos, pad, unk as strings; bos and
unk where there are any). Whether a text gets a begin of text is written in `tokenizer.json` alone: what it adds with
special tokens is added in training and in scoring.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data import hub
from jobs.data.pieces import train_pieces
from jobs.data.pretrained import pretrained
from jobs.data.spans import SpanTables
from orchestrator.errors import SourceError
from orchestrator.spec.work import TokenizerWork

if TYPE_CHECKING:
    from jobs.node.context import StageContext

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Merges settle early: more text costs seconds and moves bits per byte by less than a thousandth.
TRAINING_CHARACTERS = 4_000_000
_CHARACTERS_PER_DOCUMENT = 20_000


def run(context: StageContext, work: TokenizerWork) -> None:
    """Commit `tokenizer.json` and `special.json`; `info` holds the vocabulary size."""
    spec = work.tokenizer
    if spec.kind in ("bpe", "sentencepiece"):
        texts = sample_texts(context.fetch(work.data, "train.parquet"))
        if spec.kind == "bpe":
            tokenizer = train_bpe(texts, spec.vocab_size)
        else:
            tokenizer = train_pieces(texts, spec.vocab_size, (PAD, BOS, EOS))
        special = {"bos": BOS, "eos": EOS, "pad": PAD}
    elif spec.kind == "pretrained":
        tokenizer, special = pretrained(spec)
    else:
        raise SourceError(f"tokenizer kind {spec.kind!r} is unknown", hint="use bpe, sentencepiece or pretrained")
    blobs = {"tokenizer.json": tokenizer.to_str().encode(), "special.json": json.dumps(special).encode()}
    info = {"vocab_size": vocabulary_size(tokenizer), **special}
    context.commit(work, blobs=blobs, info=info | hub.read_at(spec.source))


def sample_texts(train: Path) -> Iterator[str]:
    """Yield the beginnings of the training documents (or examples), up to `TRAINING_CHARACTERS` in all."""
    import pyarrow.parquet as pq

    total = 0
    for batch in pq.ParquetFile(train).iter_batches(batch_size=64):
        columns = batch.to_pydict()
        if "pieces" in columns:
            texts = ["".join(pieces) for pieces in columns["pieces"]]
        else:
            texts = columns.get("text") or [p + r for p, r in zip(columns["prompt"], columns["response"], strict=True)]
        for text in texts:
            if total >= TRAINING_CHARACTERS:
                return
            piece = text[:_CHARACTERS_PER_DOCUMENT]
            total += len(piece)
            yield piece


def train_bpe(texts: Iterator[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer with at most `vocab_size` tokens: equal texts give equal merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as data stages use it, with the ids of its special tokens.

    `adds_bos`: the tokenizer puts `bos` before a text of its own accord, so prompts begin with it. `joins`: a text's
    first word is written otherwise than the same word after another text (SentencePiece puts a space before it).
    """

    tokenizer: Any
    bos: int
    eos: int
    pad: int
    adds_bos: bool = False
    joins: bool = False

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Read the blobs of a tokenizer artifact from `directory`."""
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        special = json.loads((directory / "special.json").read_text())
        names = (special.get("bos", special["eos"]), special["eos"], special.get("pad", special["eos"]))
        bos, eos, pad = (int(tokenizer.token_to_id(name)) for name in names)

        def ids(text: str) -> list[int]:
            found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return found

        joins = any(ids(one + other) != ids(one) + ids(other) for one, other in (("a", " b"), ("a\n", "b")))
        return cls(tokenizer, bos, eos, pad, adds_bos(tokenizer, bos), joins)

    @property
    def size(self) -> int:
        """How many ids a model needs: ids may have gaps, so that the highest counts."""
        return vocabulary_size(self.tokenizer)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_pairs(self, prompts: list[str], responses: list[str]) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, response ids) of each pair, as they are scored: after a begin of text where one is added.

        A prompt that brings its own begin of text gets no second one.
        """
        if self.joins:
            bare = [prompt.rstrip() for prompt in prompts]
            whole = self.encode_many([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
            before = self.encode_many(bare)
            pairs = [(first, both[len(first) :]) for first, both in zip(before, whole, strict=True)]
        else:
            pairs = list(zip(self.encode_many(prompts), self.encode_many(responses), strict=True))
        if not self.adds_bos:
            return pairs
        return [(prompt if prompt[:1] == [self.bos] else [self.bos, *prompt], response) for prompt, response in pairs]

    def encode_turns(self, pieces: list[str]) -> tuple[list[int], list[bool]]:
        """Return (ids, whether each begins in an answer) of a conversation: pieces are context, answer, context, ...

        After a begin of text where one is added and the text brings none.
        """
        if self.joins:
            # A text's first word is written otherwise: the whole is encoded, and each token is where it begins.
            whole = self.tokenizer.encode("".join(pieces), add_special_tokens=False)
            bounds = list(accumulate(map(len, pieces)))
            ids = list(whole.ids)
            answers = [bisect_right(bounds, begin) % 2 == 1 for begin, _ in whole.offsets]
        else:
            encoded = self.encode_many(pieces)
            ids = [index for piece in encoded for index in piece]
            answers = [number % 2 == 1 for number, piece in enumerate(encoded) for _ in piece]
        if self.adds_bos and ids[:1] != [self.bos]:
            return [self.bos, *ids], [False, *answers]
        return ids, answers

    def span_tables(self) -> SpanTables:
        """Return what each token does to word and sentence spans."""
        # Where a text's first space is no text, a token's string is what it adds to another one's.
        before = self.tokenizer.encode("a", add_special_tokens=False).ids if self.joins else []
        start = len(self.tokenizer.decode(before, skip_special_tokens=False))
        strings = [
            self.tokenizer.decode([*before, index], skip_special_tokens=False)[start:] for index in range(self.size)
        ]
        added = {int(index) for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return SpanTables.build(strings, added | {self.bos, self.eos, self.pad})


class Words:
    """A tokenizer artifact under the names by which scoring reads a tokenizer of transformers, without that package.

    Texts get special tokens as the artifact's own rules say, ids a text that keeps them.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        special = json.loads((directory / "special.json").read_text())
        self.backend_tokenizer, self.name_or_path = tokenizer, ""
        self.eos_token_id: int = tokenizer.token_to_id(special["eos"])
        self.bos_token_id: int | None = tokenizer.token_to_id(special["bos"]) if "bos" in special else None

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The tokens beside the vocabulary's own, with their ids."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items())}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        return str(self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens))


def vocabulary_size(tokenizer: Any) -> int:
    """Return the highest id of a tokenizer (of the tokenizers library) plus one."""
    return 1 + int(max(tokenizer.get_vocab(with_added_tokens=True).values()))


def adds_bos(tokenizer: Any, bos: int) -> bool:
    """Return whether a tokenizer (of the tokenizers library) puts the id `bos` before a text with special tokens."""
    framed, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    return bool(framed != plain and framed[:1] == [bos])


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a transformers tokenizer to `folder`, with `add_bos_token` in tokenizer_config.json.

    transformers leaves the flag out (5.23), other readers of the folder need it.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "add_bos_token": tokenizer.add_bos_token, "add_eos_token": False}
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def transformers_tokenizer(directory: Path) -> Any:
    """Return the tokenizer artifact in `directory` as one of transformers: `add_bos_token` says what it adds.

    Saved and loaded again it gives the same ids.
    """
    from transformers import PreTrainedTokenizerFast

    special = json.loads((directory / "special.json").read_text())
    vocabulary = Vocabulary.load(directory)
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.tokenizer, add_bos_token=vocabulary.adds_bos, add_eos_token=False, **names
    )
