"""What is wrong with a cell's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.data.tokenizers import foreign
from orchestrator.spec.data import TokenizerSpec
from orchestrator.spec.fields import Path
from orchestrator.spec.model import ModelSpec

# Special tokens, 256 bytes, and room for characters and their merges.
LEAST_PIECES = 512


def tokenizer_findings(model: ModelSpec, tokenizer: TokenizerSpec) -> Iterator[tuple[Path, str, str]]:
    """Yield (field, message, hint)."""
    if tokenizer.kind == "pretrained" and not tokenizer.source:
        yield ("tokenizer", "source"), "tokenizer kind 'pretrained' needs a source", "name the checkpoint it comes from"
    if tokenizer.kind == "sentencepiece" and tokenizer.vocab_size < LEAST_PIECES:
        message = f"tokenizer kind 'sentencepiece' has no room for words in {tokenizer.vocab_size} tokens"
        yield ("tokenizer", "vocab_size"), message, f"{LEAST_PIECES} or more: 256 of them stand for single bytes"
    not_own, remedy = foreign(model, tokenizer)
    if not_own:
        yield ("tokenizer", "source"), not_own, remedy
