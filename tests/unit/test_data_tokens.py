"""From documents to micro-batches: tokenizer, spans, masks, loaders."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from jobs.data.corpora import Document, Example
from jobs.data.packing import IGNORED, InstructionBatches, TextBatches
from jobs.data.pieces import train_pieces
from jobs.data.stage import parquet
from jobs.data.tokenizer import BOS, EOS, PAD, Vocabulary, train_bpe
from jobs.data.tokens import instruction_arrays, span_arrays, text_arrays
from orchestrator.errors import SourceError

TEXT = """The cat sat on the mat. "Did it?" she asked. It did! e.g. for 3.5 hours.
A new line starts here; naïve café costs 5€. (It ends.) Then again the cat sat on the mat and the dog ran."""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(train_bpe(iter([TEXT] * 4), 320).to_str())
    (directory / "special.json").write_text(json.dumps({"bos": BOS, "eos": EOS, "pad": PAD}))
    return Vocabulary.load(directory)


def test_equal_texts_give_equal_merges_and_any_text_survives(vocabulary):
    assert train_bpe(iter([TEXT] * 4), 320).to_str() == vocabulary.tokenizer.to_str()
    for text in (TEXT, "日本語 \x00 \t\n\n end"):
        (ids,) = vocabulary.encode_many([text])
        assert vocabulary.tokenizer.decode(ids) == text


def test_a_tokenizer_of_pieces_keeps_every_text_and_has_spaces_in_its_words(tmp_path):
    tokenizer = train_pieces(iter([TEXT] * 4), 600, (PAD, BOS, EOS))
    assert tokenizer.to_str() == train_pieces(iter([TEXT] * 4), 600, (PAD, BOS, EOS)).to_str()
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[name] for name in (PAD, BOS, EOS, "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 258]
    assert len(vocabulary) <= 600
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "special.json").write_text(json.dumps({"bos": BOS, "eos": EOS, "pad": PAD}))
    loaded = Vocabulary.load(tmp_path)
    assert (loaded.bos, loaded.eos, loaded.pad, loaded.joins) == (1, 2, 0, True)
    for text in (TEXT, " the cat", "  two  spaces\n\n\tand lines ", "日本語 🙂 \x00", "<0x41> is written as it is", ""):
        (ids,) = loaded.encode_many([text])
        assert loaded.tokenizer.decode(ids) == text
        unseen = text.encode() if "日" in text else b""
        assert all(f"<0x{value:02X}>" in tokenizer.encode(text).tokens for value in unseen if value > 127)
    assert tokenizer.encode("the cat").tokens == ["\u2581the", "\u2581cat"]
    ((prompt, response),) = loaded.encode_pairs(["The cat"], [" sat"])
    assert loaded.tokenizer.decode(prompt + response) == "The cat sat"
    assert [loaded.tokenizer.id_to_token(i) for i in response] == ["\u2581sat"]


def test_words_and_sentences_are_what_a_reader_sees(vocabulary):
    tables = vocabulary.span_tables()
    (ids,) = vocabulary.encode_many(['He ran. "Why?" she asked. It cost 3.5 coins.\n\nNext line'])
    words, sentences = tables.spans(np.array(ids))

    def pieces(spans):
        groups = [[token for token, span in zip(ids, spans, strict=True) if span == i] for i in range(spans[-1] + 1)]
        return [vocabulary.tokenizer.decode(group) for group in groups]

    assert pieces(sentences) == ["He ran.", ' "Why?"', " she asked.", " It cost 3.5 coins.\n\n", "Next line"]
    assert [word.strip() for word in pieces(words)][:5] == ["He", "ran.", '"Why?"', "she", "asked."]


def test_a_changed_ending_never_moves_an_earlier_boundary(vocabulary):
    tables = vocabulary.span_tables()
    generator = random.Random(0)
    (ids,) = vocabulary.encode_many([TEXT])
    for _ in range(300):
        cut = generator.randrange(1, len(ids))
        ending = [generator.randrange(vocabulary.size) for _ in range(5)]
        whole = np.array([*ids[:cut], *ending])
        for before, after in zip(tables.spans(np.array(ids[:cut])), tables.spans(whole), strict=True):
            assert (before == after[:cut]).all()


@pytest.fixture(scope="module")
def text_directory(vocabulary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    documents = [Document(f"d{i}", "test", f"Story {i}. {TEXT}") for i in range(6)]
    (directory / "train.parquet").write_bytes(parquet(documents))
    arrays = text_arrays(directory / "train.parquet", vocabulary)
    for name, array in (arrays | span_arrays(arrays["tokens"], vocabulary.span_tables())).items():
        np.save(directory / f"train_{name}.npy", array)
    return directory


def test_documents_are_framed_and_counted_in_bytes(vocabulary, text_directory):
    tokens, docs = np.load(text_directory / "train_tokens.npy"), np.load(text_directory / "train_docs.npy")
    sizes = np.load(text_directory / "train_bytes.npy")
    assert tokens.dtype == np.uint16
    assert (tokens[docs] == vocabulary.bos).all()
    assert (tokens[docs[1:] - 1] == vocabulary.eos).all()
    second = tokens[docs[1] + 1 : docs[2] - 1]
    text = vocabulary.tokenizer.decode(second.tolist())
    assert text.startswith("Story 1.")
    assert len(text.encode()) == sizes[1]


def test_a_micro_batch_is_a_pure_function_and_an_epoch_shows_each_window_once(text_directory):
    batches = TextBatches(text_directory, 16, seed=1, accumulation=2)
    wanted = batches.micro_batch(3, 1, 4)
    fresh = TextBatches(text_directory, 16, seed=1, accumulation=2)
    fresh.micro_batch(9, 0, 4)  # what was read before does not matter
    assert torch.equal(fresh.micro_batch(3, 1, 4).input_ids, wanted.input_ids)
    assert not torch.equal(
        TextBatches(text_directory, 16, seed=2, accumulation=2).micro_batch(3, 1, 4).input_ids, wanted.input_ids
    )
    single = TextBatches(text_directory, 16, seed=1)
    tokens = np.load(text_directory / "train_tokens.npy").astype(np.int64)
    rows = [single.micro_batch(step, 0, 1).input_ids[0].tolist() for step in range(single.windows)]
    starts = []
    for row in rows:
        matches = [i for i in range(len(tokens) - 15) if tokens[i : i + 16].tolist() == row]
        starts.append({i % 16 for i in matches})
    shift = set.intersection(*starts)
    assert len(shift) == 1  # one cut for the whole epoch, so windows cannot overlap
    offset = shift.pop()
    expected = sorted(tokens[i * 16 + offset : i * 16 + offset + 16].tolist() for i in range(single.windows))
    assert sorted(rows) == expected
    with pytest.raises(ValueError, match="micro-batch 2"):
        batches.micro_batch(0, 2, 4)


def test_micro_batches_of_a_step_are_the_next_rows_whatever_the_accumulation(text_directory):
    whole = TextBatches(text_directory, 16, seed=1).micro_batch(2, 0, 6).input_ids
    halves = TextBatches(text_directory, 16, seed=1, accumulation=2)
    parts = [halves.micro_batch(2, index, 3).input_ids for index in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_labels_are_the_next_tokens(text_directory):
    batch = TextBatches(text_directory, 16, seed=0).micro_batch(0, 0, 3)
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    assert (batch.labels != IGNORED).all()
    assert (batch.spans_word[:, 0] == 0).all()
    assert (batch.spans_word.diff(dim=1) >= 0).all()


def test_too_little_text_for_one_window_is_an_error(text_directory):
    with pytest.raises(SourceError, match="too few"):
        TextBatches(text_directory, 100_000, seed=0)


def _instruction_directory(vocabulary, directory, max_length=0):
    examples = [Example(f"e{i}", "test", f"Question: what is {i}? " * (i + 1), f" answer {i}") for i in range(5)]
    (directory / "train.parquet").write_bytes(parquet(examples))
    arrays = instruction_arrays(directory / "train.parquet", vocabulary, max_length)
    for name, array in (arrays | span_arrays(arrays["tokens"], vocabulary.span_tables())).items():
        np.save(directory / f"train_{name}.npy", array)
    return arrays


def test_only_responses_carry_loss(vocabulary, tmp_path):
    _instruction_directory(vocabulary, tmp_path)
    batches = InstructionBatches(tmp_path, 512, seed=0)
    seen = set()
    for step in range(5):
        batch = batches.micro_batch(step, 0, 1)
        kept = batch.labels[0][batch.labels[0] != IGNORED].tolist()
        assert kept[-1] == vocabulary.eos
        seen.add(vocabulary.tokenizer.decode(kept[:-1]))
    assert seen == {f" answer {i}" for i in range(5)}
    everywhere = InstructionBatches(tmp_path, 512, seed=0, loss="all").micro_batch(0, 0, 3)
    assert ((everywhere.labels != IGNORED) == (everywhere.attention_mask == 1)).all()


def test_padding_is_masked_and_carries_no_loss(vocabulary, tmp_path):
    _instruction_directory(vocabulary, tmp_path)
    batch = InstructionBatches(tmp_path, 512, seed=0, pad=vocabulary.pad).micro_batch(0, 0, 5)
    lengths = batch.attention_mask.sum(1)
    assert lengths.max() == batch.input_ids.shape[1]
    assert lengths.min() < lengths.max()
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
    assert (batch.input_ids[batch.attention_mask == 0] == vocabulary.pad).all()


def test_long_examples_keep_their_response(vocabulary, tmp_path):
    arrays = _instruction_directory(vocabulary, tmp_path, max_length=20)
    offsets, mask = arrays["offsets"], arrays["loss_mask"]
    assert (np.diff(offsets) <= 20).all()
    for i in range(5):
        response = arrays["tokens"][offsets[i] : offsets[i + 1]][mask[offsets[i] : offsets[i + 1]]]
        assert vocabulary.tokenizer.decode(response[:-1].tolist()) == f" answer {i}"
    short = InstructionBatches(tmp_path, 12, seed=0).micro_batch(0, 0, 5)
    assert short.input_ids.shape[1] <= 12
    assert ((short.labels != IGNORED).sum(1) > 0).all()
