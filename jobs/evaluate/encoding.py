"""Text pairs to token ids as lm-eval's Hugging Face model makes them, without encoding a few-shot context eight times.

A byte-level BPE splits text into words first, and a space between two letters is always such a split. So a context can
be encoded up to its last one once, and only the short rest again with every continuation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Request = tuple[str, str]
Pair = tuple[list[int], list[int]]
Ids = NDArray[np.int32]
Encode = Callable[[Sequence[Request]], Sequence[Pair]]

# Requests encoded in one call: lists of tokens are bulky, what is kept of them is not.
TOGETHER = 4096

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

    def pairs(self, requests: Sequence[Request]) -> list[Pair]:
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


class Encodings:
    """The token ids of requests, encoded once. A context that several choices share is held once."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._known: dict[Request, tuple[Ids, Ids]] = {}

    def __call__(self, requests: Sequence[Request]) -> list[tuple[Ids, Ids]]:
        """Return (context ids, continuation ids) of each request."""
        missing = list(dict.fromkeys(request for request in requests if request not in self._known))
        for at in range(0, len(missing), TOGETHER):
            part = missing[at : at + TOGETHER]
            before = np.empty(0, dtype=np.int32)
            for request, (context, continuation) in zip(part, self._encode(part), strict=True):
                ids = np.array(context, dtype=np.int32)
                before = before if np.array_equal(ids, before) else ids
                self._known[request] = (before, np.array(continuation, dtype=np.int32))
        return [self._known[request] for request in requests]

    def lengths(self, requests: Sequence[Request]) -> list[int]:
        """Return the number of tokens that each request feeds to a model."""
        return [len(context) + len(continuation) - 1 for context, continuation in self(requests)]

    def keep(self, requests: Sequence[Request]) -> None:
        """Forget all other requests."""
        self._known = {request: self._known[request] for request in requests if request in self._known}
