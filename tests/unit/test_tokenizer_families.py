"""Public tokenizers: special tokens as declared, and one begin of text in training, scoring and export, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from jobs.data.corpora import Example
from jobs.data.pretrained import differing, pretrained
from jobs.data.stage import parquet
from jobs.data.tokenizer import Vocabulary, Words, save_tokenizer, transformers_tokenizer
from jobs.data.tokens import instruction_arrays
from jobs.evaluate.encoding import Encoder
from orchestrator.errors import SourceError
from orchestrator.spec.cell import TokenizerSpec
from tests.tokenizer_families import DEEPSEEK_BOS, DEEPSEEK_EOS, FAMILIES

# What each family's files declare, and the begin of text that its tokenizer adds.
DECLARED: dict[str, tuple[dict[str, str], str]] = {
    "llama3": ({"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|end_of_text|>"}, "<|begin_of_text|>"),
    "deepseek": ({"bos": DEEPSEEK_BOS, "eos": DEEPSEEK_EOS, "pad": DEEPSEEK_EOS}, DEEPSEEK_BOS),
    "qwen": ({"eos": "<|im_end|>", "pad": "<|endoftext|>"}, ""),
    "gpt2": ({"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}, ""),
    "sentencepiece": ({"bos": "<s>", "eos": "</s>", "pad": "</s>", "unk": "<unk>"}, "<s>"),
    "unigram": ({"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}, ""),
}
TEXTS = ("Question: what is 12? Answer: the cat sat.", "naïve café costs 5€ — 日本", "  two  spaces\n\nand lines", "")
PAIRS = [("Question: what is 12?", " the cat"), ("The mat.\n", "a dog ran")]


def artifact(folder: Path, source: Path) -> Path:
    """Write what the tokenizer stage commits for `source` to `folder`."""
    tokenizer, special = pretrained(TokenizerSpec(kind="pretrained", source=f"file://{source}"))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "special.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    source = FAMILIES[request.param](tmp_path / "source")
    return request.param, source, artifact(tmp_path / "artifact", source)


def expected(source: Path, bos: str, text: str) -> list[int]:
    """Return the ids of `text` by the published tokenizer.json, after the begin of text that the family adds."""
    tokenizer: Any = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [tokenizer.token_to_id(bos), *ids] if bos else list(ids)


def test_special_tokens_are_the_declared_ones(family: tuple[str, Path, Path]) -> None:
    name, _, directory = family
    special, bos = DECLARED[name]
    assert json.loads((directory / "special.json").read_text()) == special
    vocabulary, public = Vocabulary.load(directory), transformers_tokenizer(directory)
    assert (public.bos_token, public.eos_token, public.pad_token) == tuple(map(special.get, ("bos", "eos", "pad")))
    assert vocabulary.adds_bos == public.add_bos_token == bool(bos)
    assert vocabulary.bos == vocabulary.tokenizer.token_to_id(special.get("bos", special["eos"]))


def test_scoring_reads_a_tokenizer_as_transformers_does(family: tuple[str, Path, Path]) -> None:
    ours, theirs = Words(family[2]), transformers_tokenizer(family[2])
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skipped in (True, False):
                assert ours.decode(ids, skip_special_tokens=skipped) == theirs.decode(ids, skip_special_tokens=skipped)


def test_a_begin_of_text_is_trained_and_scored_alike(family: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, source, directory = family
    bos = DECLARED[name][1]
    vocabulary, public = Vocabulary.load(directory), Words(directory)
    (tmp_path / "train.parquet").write_bytes(parquet([Example(p, "test", p, r) for p, r in PAIRS]))
    arrays = instruction_arrays(tmp_path / "train.parquet", vocabulary)
    encoder = Encoder(public, public.bos_token_id if public.bos_token_id is not None else public.eos_token_id)
    for i, (prompt, response) in enumerate(PAIRS):
        row = slice(arrays["offsets"][i], arrays["offsets"][i + 1])
        trained, mask = arrays["tokens"][row].tolist(), arrays["loss_mask"][row]
        assert trained == [*expected(source, bos, prompt + response), vocabulary.eos]
        ((context, continuation),) = encoder.pairs([(prompt, response)])
        assert context + continuation == trained[:-1]
        assert mask.sum() in (len(continuation) + 1, len(continuation))  # white space at a prompt's end is its own
    short = instruction_arrays(tmp_path / "train.parquet", vocabulary, max_length=12)
    starts = short["tokens"][short["offsets"][:-1]]
    assert (np.diff(short["offsets"]) <= 12).all()
    assert not bos or (starts == vocabulary.bos).all()


def test_a_prompt_that_brings_its_begin_of_text_gets_no_second_one(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(artifact(tmp_path / "artifact", FAMILIES["deepseek"](tmp_path / "source")))
    ((prompt, _),) = vocabulary.encode_pairs([f"{DEEPSEEK_BOS}Question:"], [" yes"])
    assert prompt.count(vocabulary.bos) == 1
    assert prompt[0] == vocabulary.bos


@pytest.mark.parametrize("model_type", ["olmoe", "llama", "qwen2_moe"])
def test_an_exported_tokenizer_gives_the_ids_of_ours(
    family: tuple[str, Path, Path], tmp_path: Path, model_type: str
) -> None:
    name, source, directory = family
    bos = DECLARED[name][1]
    ours = transformers_tokenizer(directory)
    save_tokenizer(ours, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) == expected(source, bos, text)
    assert again.special_tokens_map == ours.special_tokens_map
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] == bool(bos)


@pytest.mark.parametrize("name", ["llama3", "qwen", "gpt2", "sentencepiece", "unigram"])
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source = FAMILIES[name](tmp_path / "source")
    ours = transformers_tokenizer(artifact(tmp_path / "artifact", source))
    theirs = AutoTokenizer.from_pretrained(source)
    # Of SentencePiece's leading white space transformers makes other ids than the published tokenizer.json.
    for text in TEXTS[:2] if name == "sentencepiece" else TEXTS:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_decides_over_the_template(tmp_path: Path, flag: bool) -> None:
    source = FAMILIES["llama3"](tmp_path / "source")
    tokenizer: Any = Tokenizer.from_file(str(source / "tokenizer.json"))
    if flag:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": flag}))
    public = transformers_tokenizer(artifact(tmp_path / "artifact", source))
    assert (public.encode("cat")[0] == public.bos_token_id) is flag
    assert public.add_bos_token is flag


def test_what_a_tokenizer_json_cuts_pads_or_appends_never_reaches_a_text(tmp_path: Path) -> None:
    source = FAMILIES["gpt2"](tmp_path / "source")
    tokenizer: Any = Tokenizer.from_file(str(source / "tokenizer.json"))
    plain = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A:0", f"{end[0]}:0"], special_tokens=[end])
    tokenizer.save(str(source / "tokenizer.json"))
    directory = artifact(tmp_path / "artifact", source)
    assert Vocabulary.load(directory).encode_many([TEXTS[0]]) == [plain]
    assert transformers_tokenizer(directory).encode(TEXTS[0]) == plain


def test_a_vocabulary_alone_is_known_by_public_names(tmp_path: Path) -> None:
    source = FAMILIES["deepseek"](tmp_path / "source")
    alone = (source / "tokenizer.json").rename(tmp_path / "words.json")
    _, special = pretrained(TokenizerSpec(kind="pretrained", source=f"file://{alone}"))
    assert special == {"bos": DEEPSEEK_BOS, "eos": DEEPSEEK_EOS, "pad": DEEPSEEK_EOS}


def test_a_declared_token_that_the_vocabulary_lacks_is_refused_by_file_and_name(tmp_path: Path) -> None:
    source = FAMILIES["gpt2"](tmp_path / "source")
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}')
    with pytest.raises(SourceError, match=r"tokenizer_config\.json declares eos_token '<\|fin\|>'") as raised:
        pretrained(TokenizerSpec(kind="pretrained", source=f"file://{source}"))
    assert raised.value.hint


def test_a_tokenizer_that_has_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    source = FAMILIES["gpt2"](tmp_path / "source")
    with pytest.raises(SourceError, match="has changed since the grid was planned"):
        pretrained(TokenizerSpec(kind="pretrained", source=f"file://{source}", digest="0" * 64))


def test_a_model_has_a_row_for_the_highest_id(tmp_path: Path) -> None:
    source = FAMILIES["gpt2"](tmp_path / "source")
    whole = json.loads((source / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    words["zz"] = max(words.values()) + 40  # an id after a gap
    (source / "tokenizer.json").write_text(json.dumps(whole))
    vocabulary = Vocabulary.load(artifact(tmp_path / "artifact", source))
    assert vocabulary.size == words["zz"] + 1
    assert len(vocabulary.span_tables().special) == vocabulary.size


def test_words_are_known_where_a_texts_first_space_is_no_text(tmp_path: Path) -> None:
    directory = artifact(tmp_path / "artifact", FAMILIES["sentencepiece"](tmp_path / "source"))
    vocabulary = Vocabulary.load(directory)
    (ids,) = vocabulary.encode_many(["The cat sat on the mat"])
    words, _ = vocabulary.span_tables().spans(np.array(ids))
    assert words[-1] == 5


def test_tokenizers_are_compared_by_what_their_ids_mean(tmp_path: Path) -> None:
    ours, _ = pretrained(TokenizerSpec(kind="pretrained", source=f"file://{FAMILIES['gpt2'](tmp_path / 'one')}"))
    source = FAMILIES["gpt2"](tmp_path / "other")
    again = AutoTokenizer.from_pretrained(source)
    again.save_pretrained(source)
    theirs, _ = pretrained(TokenizerSpec(kind="pretrained", source=f"file://{source}"))
    assert differing(ours, theirs) == ""
    whole = json.loads((source / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (source / "tokenizer.json").write_text(json.dumps(whole))
    swapped, _ = pretrained(TokenizerSpec(kind="pretrained", source=f"file://{source}"))
    assert differing(ours, swapped).startswith("2 tokens differ; 'a' is id")
