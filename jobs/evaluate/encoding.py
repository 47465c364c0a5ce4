"""Text pairs to token ids as lm-eval's Hugging Face model makes them, without encoding a few-shot context eight times.

A byte-level BPE splits text into words first, and a space between two letters is always such a split. So a context can
be encoded up to its last one once, and only the short rest again with every continuation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Pair = tuple[list[int], list[int]]

_LAST_GAP = re.compile(r".*[A-Za-z](?= [A-Za-z])", re.DOTALL)
_LOCAL = {"ByteLevel", "Split", "Digits", "Sequence"}


class Encoder:
    """Encodes requests with a transformers tokenizer; `prefix_token` stands before what has no context."""

    def __init__(self, tokenizer: Any, prefix_token: int) -> None:
        self.tokenizer = tokenizer
        self.prefix_token = prefix_token
        self._prefix_text = tokenizer.decode([prefix_token])
        self._backend = _local_backend(tokenizer)
        added = [token for token in getattr(tokenizer, "added_tokens_encoder", {}) if token]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Return the ids of `text`; special tokens as the tokenizer adds them, unless the text brings its own."""
        if special is None:
            special = not (self._prefix_text and text.startswith(self._prefix_text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids

    def pairs(self, requests: Sequence[tuple[str, str]]) -> list[Pair]:
        """Return (context ids, continuation ids) for each (context, continuation)."""
        done: list[Pair | None] = [self._bare(c) if context == "" else None for context, c in requests]
        texts: dict[str, list[int]] = {}
        parts: list[tuple[int, str, str, str]] = []  # request, left part, rest of the context, rest with continuation
        for number, (context, continuation) in enumerate(requests):
            if done[number] is not None:
                continue
            stripped = context.rstrip()
            continuation, context = context[len(stripped) :] + continuation, stripped
            gap = _LAST_GAP.match(context) if self._is_local(context + continuation) else None
            if gap is None:
                whole, before = self.encode(context + continuation), self.encode(context)
                done[number] = (before, whole[len(before) :])
                continue
            left, rest = context[: gap.end()], context[gap.end() :]
            parts.append((number, left, rest, rest + continuation))
            for text in (left, rest, rest + continuation):
                texts.setdefault(text, [])
        if texts:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            texts = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        for number, left, rest, whole_rest in parts:
            done[number] = ([*texts[left], *texts[rest]], texts[whole_rest][len(texts[rest]) :])
        return [pair for pair in done if pair is not None]

    def _is_local(self, text: str) -> bool:
        return self._backend is not None and (self._added is None or self._added.search(text) is None)

    def _bare(self, continuation: str) -> Pair:
        ids = self.encode(continuation, special=False)
        return (ids[:1], ids[1:]) if ids and ids[0] == self.prefix_token else ([self.prefix_token], ids)


def _local_backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer when its words can be encoded apart from each other, else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None
        or type(backend.model).__name__ != "BPE"
        or backend.model.dropout
        or backend.normalizer is not None
    ):
        return None
    if tokenizer.encode("ab") != tokenizer.encode("ab", add_special_tokens=False):
        return None
    if backend.pre_tokenizer is None:
        return None
    state = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state.get("pretokenizers", [state])
    if any(part["type"] not in _LOCAL or "(?<" in json.dumps(part) for part in parts):
        return None
    if any(part.get("add_prefix_space") for part in parts):
        return None
    offsets = [span for _, span in backend.pre_tokenizer.pre_tokenize_str("ab cd")]
    return backend if offsets == [(0, 2), (2, 5)] else None
