"""The tokens stage: a data artifact as token ids, with documents, spans and the loss mask.

Text: `<split>_tokens.npy` is one stream of `<bos> document <eos>`, `<split>_docs.npy` where each document begins,
`<split>_bytes.npy` its size in UTF-8 bytes. Instructions: `<split>_offsets.npy` [examples + 1] cuts the stream into
examples `prompt response <eos>` (conversations: `turns <eos>`), with `<bos>` before them where the tokenizer adds one;
`<split>_loss_mask.npy` is true on responses. Both: `<split>_spans_word.npy` and `<split>_spans_sentence.npy` are true
where a word or a sentence begins. `span_tables.npy` serves new text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.images import BLOB, load_images, pixels
from jobs.data.spans import SpanTables
from jobs.data.tokenizer import Vocabulary
from jobs.data.whole_tables import whole_rows
from orchestrator.errors import SourceError
from orchestrator.spec.work import TokensWork

if TYPE_CHECKING:
    from jobs.node.context import StageContext

Arrays = dict[str, NDArray[Any]]
_BATCH = 512


def run(context: StageContext, work: TokensWork) -> None:
    """Tokenize both splits and commit the arrays; `info["tokens"]` counts the tokens of each split."""
    vocabulary = Vocabulary.load(context.directory(work.tokenizer))
    tables = vocabulary.span_tables()
    blobs: dict[str, Path | bytes] = {}
    tokens = {}
    parts: dict[str, int] = context.manifest(work.data).info.get("corpora", {})
    ranges: dict[str, list[int]] = {}
    pictures: Arrays = {}
    if work.format == "vision":
        pixels, pictures = picture_arrays(context, work)
        blobs["pixels.npy"] = context.scratch / "pixels.npy"
        np.save(context.scratch / "pixels.npy", pixels)
    for split in ("train", "heldout"):
        columns = context.fetch(work.data, f"{split}.parquet")
        if work.format == "text":
            arrays = text_arrays(columns, vocabulary)
        elif work.format == "instruction":
            arrays = instruction_arrays(columns, vocabulary, work.max_length)
        elif work.format == "vision":
            arrays = instruction_arrays(columns, vocabulary, work.max_length)
            arrays["pictures"] = pictures[split]
        elif work.format == "chat":
            arrays = chat_arrays(columns, vocabulary, work.max_length)
        else:
            raise SourceError(f"data format {work.format!r} is unknown", hint="use text, instruction, chat or vision")
        if split == "train" and parts:
            edges = arrays["offsets"] if "offsets" in arrays else np.append(arrays["docs"], len(arrays["tokens"]))
            ranges = corpus_ranges(parts, [*range(len(edges))] if "offsets" in arrays else edges.tolist())
        arrays |= span_arrays(arrays["tokens"], tables)
        tokens[split] = len(arrays["tokens"])
        for name, array in arrays.items():
            path = context.scratch / f"{split}_{name}.npy"
            np.save(path, array)
            blobs[path.name] = path
    tables.save(context.scratch / "span_tables.npy")
    blobs["span_tables.npy"] = context.scratch / "span_tables.npy"
    special = {"bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad}
    corpora = {"corpora": ranges} if ranges else {}
    context.commit(work, blobs=blobs, info={"tokens": tokens, "vocab_size": vocabulary.size, **special, **corpora})


def corpus_ranges(rows: dict[str, int], edges: list[int]) -> dict[str, list[int]]:
    """Return where the rows of each corpus begin and end, in tokens of text or in examples.

    `rows` are how many each has, in their order; `edges` where each row begins, and the end of the last one.
    """
    bounds = [0, *accumulate(rows.values())]
    return {name: [edges[a], edges[b]] for name, (a, b) in zip(rows, pairwise(bounds), strict=True)}


def _id_type(vocabulary: Vocabulary) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocabulary.size <= 2**16 else np.uint32


def _batches(parquet: Path, names: list[str]) -> Iterator[list[list[str]]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(parquet).iter_batches(batch_size=_BATCH, columns=names):
        yield [batch.column(name).to_pylist() for name in names]


def text_arrays(parquet: Path, vocabulary: Vocabulary) -> Arrays:
    """Return `tokens`, `docs` and `bytes` of the documents in a Parquet file."""
    pieces: list[NDArray[Any]] = []
    starts, sizes, position = [], [], 0
    dtype = _id_type(vocabulary)
    for (texts,) in _batches(parquet, ["text"]):
        for text, ids in zip(texts, vocabulary.encode_many(texts), strict=True):
            pieces.append(np.array([vocabulary.bos, *ids, vocabulary.eos], dtype=dtype))
            starts.append(position)
            sizes.append(len(text.encode()))
            position += len(pieces[-1])
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)
    return {"tokens": tokens, "docs": np.array(starts, dtype=np.int64), "bytes": np.array(sizes, dtype=np.int64)}


def instruction_arrays(parquet: Path, vocabulary: Vocabulary, max_length: int = 0) -> Arrays:
    """Return `tokens`, `offsets` and `loss_mask` of prompt and response pairs.

    An example longer than `max_length` loses the beginning of its prompt, then the end of its response.
    """
    tokens: list[int] = []
    mask: list[bool] = []
    offsets = [0]
    for prompts, responses in _batches(parquet, ["prompt", "response"]):
        for prompt, response in vocabulary.encode_pairs(prompts, responses):
            answer = [*response, vocabulary.eos]
            if max_length:
                answer = answer[: max_length - 1]
                cut = max(0, len(prompt) + len(answer) - max_length)
                first = 1 if cut and vocabulary.adds_bos else 0
                prompt = prompt[:first] + prompt[first + cut :]
            tokens += prompt + answer
            mask += [False] * len(prompt) + [True] * len(answer)
            offsets.append(len(tokens))
    return {
        "tokens": np.array(tokens, dtype=_id_type(vocabulary)),
        "offsets": np.array(offsets, dtype=np.int64),
        "loss_mask": np.array(mask, dtype=bool),
    }


def chat_arrays(parquet: Path, vocabulary: Vocabulary, max_length: int = 0) -> Arrays:
    """Return `tokens`, `offsets` and `loss_mask` of conversations: every answer carries the loss, and the end of text.

    One longer than `max_length` loses its beginning, but nothing of its last answer before that one's end.
    """
    tokens: list[int] = []
    mask: list[bool] = []
    offsets = [0]
    for (rows,) in _batches(parquet, ["pieces"]):
        for pieces in rows:
            ids, answers = vocabulary.encode_turns(list(pieces))
            ids, answers = [*ids, vocabulary.eos], [*answers, True]
            if max_length and len(ids) > max_length:
                last = len(answers) - answers[::-1].index(False) if False in answers else 0
                begin = min(len(ids) - max_length, max(0, last - 1))
                ids, answers = ids[begin : begin + max_length], answers[begin : begin + max_length]
                if vocabulary.adds_bos:
                    ids[0], answers[0] = vocabulary.bos, False
            tokens += ids
            mask += answers
            offsets.append(len(tokens))
    return {
        "tokens": np.array(tokens, dtype=_id_type(vocabulary)),
        "offsets": np.array(offsets, dtype=np.int64),
        "loss_mask": np.array(mask, dtype=bool),
    }


def picture_arrays(context: StageContext, work: TokensWork) -> tuple[NDArray[np.uint8], Arrays]:
    """Return (the pictures of all rows [n, H, W, 3], by split which of them each row is about).

    Raises SourceError for a row without a picture, or with several.
    """
    encoded = load_images(context.fetch(work.data, BLOB))
    places = {name: place for place, name in enumerate(encoded)}
    found: Arrays = {}
    for split in ("train", "heldout"):
        rows = whole_rows(context.fetch(work.data, f"{split}.parquet"), "id", "images")
        for row in rows:
            if len(row["images"]) != 1:
                raise SourceError(
                    f"row {row['id']} is about {len(row['images'])} pictures",
                    cause="a model is shown one picture before its text",
                    hint="make them one picture, or leave the row out",
                )
        found[split] = np.array([places[row["images"][0]] for row in rows], dtype=np.int64)
    stacked = [pixels(data, work.image_size, f"picture {name}") for name, data in encoded.items()]
    return np.stack(stacked), found


def span_arrays(tokens: NDArray[Any], tables: SpanTables) -> Arrays:
    """Return where words and sentences begin in a stream of tokens."""
    return {"spans_word": tables.word_starts(tokens), "spans_sentence": tables.sentence_starts(tokens)}
