"""Small tokenizers in the layouts of public families, written as their repositories have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = """The cat sat on the mat. "Did it?" she asked. It did! e.g. for 3.5 hours, doesn't it?
A new line starts here; naïve café costs 5€. (It ends.) Question: what is 12? Answer: the dog ran and the cat sat."""
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPLIT = _ENDINGS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A small Llama's config.json, which makes a folder with one of these tokenizers a checkpoint.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "rms_norm_eps": 2e-6,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
}


def _byte_level(special: list[str], split: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    parts = [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), bytes_]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if split else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _framed(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[f"{bos}:0", "$A:0"],
        pair=[f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"],
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def _write(folder: Path, tokenizer: Tokenizer, **files: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False))
    return folder


def _added(token: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": True, "rstrip": False}


def llama3(folder: Path) -> Path:
    """Write byte-level BPE whose template adds the begin of text; two ends of text in its generation_config."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _framed(_byte_level(names), names[0])
    ids = [tokenizer.token_to_id(name) for name in names]
    config = {"bos_token": names[0], "eos_token": names[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    return _write(
        folder, tokenizer, tokenizer_config=config, generation_config={"bos_token_id": ids[0], "eos_token_id": ids[1:]}
    )


def deepseek(folder: Path) -> Path:
    """Write byte-level BPE that declares itself LlamaTokenizerFast with add_bos_token, as DeepSeek's do."""
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _added(DEEPSEEK_BOS),
        "eos_token": _added(DEEPSEEK_EOS),
        "pad_token": _added(DEEPSEEK_EOS),
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    return _write(folder, _byte_level([DEEPSEEK_BOS, DEEPSEEK_EOS]), tokenizer_config=config)


def qwen(folder: Path) -> Path:
    """Write byte-level BPE without a begin of text, whose end of text is none of the usual names."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    tokenizer = _byte_level(names)
    return _write(folder, tokenizer, tokenizer_config=config, config={"bos_token_id": tokenizer.token_to_id(names[0])})


def gpt2(folder: Path) -> Path:
    """Write byte-level BPE with one special token, named by the ids of config.json alone."""
    tokenizer = _byte_level(["<|endoftext|>"], split=False)
    end = tokenizer.token_to_id("<|endoftext|>")
    return _write(folder, tokenizer, config={"bos_token_id": end, "eos_token_id": end, "model_type": "gpt2"})


def sentencepiece(folder: Path) -> Path:
    """Write BPE over SentencePiece's pieces with byte fallback and a template that adds the begin of text: Llama 2."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    # Trained on words, so that no piece crosses a space.
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _added("<s>"),
        "eos_token": _added("</s>"),
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": _added("<unk>"),
    }
    return _write(folder, _framed(tokenizer, "<s>"), tokenizer_config=config)


def unigram(folder: Path) -> Path:
    """Write a unigram model over SentencePiece's pieces that declares its special tokens in special_tokens_map.json."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    names = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>"}
    return _write(folder, tokenizer, special_tokens_map=names)


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    made.__name__: made for made in (llama3, deepseek, qwen, gpt2, sentencepiece, unigram)
}
