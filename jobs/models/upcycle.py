"""Sparse upcycling: a Mixture-of-Experts model that starts from a dense checkpoint (Komatsuzaki et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.models.backbones import CausalLM
from jobs.models.building import drawn_weights, empty_model
from jobs.models.convert import PublicWeights
from jobs.models.shared_start import with_shared
from jobs.models.sources import open_checkpoint
from jobs.models.vision.sight import PREFIX as SIGHT
from jobs.models.vision.sight import carried_sight
from jobs.models.weights import canonical_state, replace_parameters
from jobs.moe.block import DenseBlock, MoEBlock, dense_width
from orchestrator.catalog.routers import DENSE
from orchestrator.data.pinning import files_sha256
from orchestrator.errors import MoegridError
from orchestrator.spec.model import Model, ModelSpec
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model, sighted, text_part
from orchestrator.spec.upcycling import change_at_start, upcycling_problems, weight_scale

SEED = 42

Weights = Iterator[tuple[str, Tensor]]


def initial_model(spec: ModelSpec, vocab_size: int, seed: int = 0) -> CausalLM:
    """Return the model that a run starts from, with its weights (`initial_weights`)."""
    return _filled(*initial_weights(spec, vocab_size, seed))


def initial_weights(spec: ModelSpec, vocab_size: int, seed: int = 0) -> tuple[CausalLM, Weights]:
    """Return (an empty model, its weights by name, in no order): random, imported, or upcycled.

    Memory holds one module's weights at a time, whatever the model's size (of a vision side all of them). Random ones
    come from torch's current generator; `seed` shifts the generator of upcycling, so that seed 0 is the published 42.
    Raises MoegridError.
    """
    if spec.vision is not None:
        seeing = empty_model(spec, vocab_size)
        _, weights = initial_weights(text_part(seeing.spec), vocab_size, seed)
        return seeing, chain(weights, carried_sight(seeing.spec, sighted(seeing.spec), {}, seed, SEED + seed))
    if not spec.checkpoint:
        if spec.upcycle:
            raise MoegridError(
                f"upcycle {spec.upcycle!r} needs a checkpoint to start from", hint="set model.checkpoint"
            )
        model = empty_model(spec, vocab_size)
        drawn = _random(model)
        return model, with_shared(model, drawn, spec.shared_from) if spec.shared_from else drawn
    checkpoint = open_checkpoint(spec.checkpoint)
    if spec.checkpoint_digest and files_sha256(Path(spec.checkpoint.removeprefix("file://"))) != spec.checkpoint_digest:
        raise MoegridError(f"{spec.checkpoint} has changed since the grid was planned", hint="plan it again")
    vocab = spec.vocab_size or vocab_size
    if vocab != checkpoint.config["vocab_size"]:
        raise MoegridError(
            f"the model has {vocab} token ids, the checkpoint {checkpoint.name} {checkpoint.config['vocab_size']}",
            hint="set model.vocab_size to the checkpoint's; it may exceed the tokenizer's",
        )
    theirs = spec_of(checkpoint.config)
    _check_shape(spec, resolve_model(theirs), checkpoint.name)
    model = empty_model(spec, vocab)
    if spec.upcycle:
        dense = empty_model(theirs, vocab)
        return model, _upcycled(model, PublicWeights(checkpoint, canonical_state(dense), dense.spec), SEED + seed)
    return model, _imported(model, PublicWeights(checkpoint, canonical_state(model), model.spec))


def carried_weights(
    spec: Model, vocab_size: int, state: Mapping[str, Tensor], seed: int = 0
) -> tuple[CausalLM, Weights]:
    """Return (an empty model that sees, its weights by name): those of `state`, and what the state does not have.

    `state` are the weights of a model that reads text, or of one whose vision side is dense: it then is upcycled.
    """
    model = empty_model(spec, vocab_size)
    language = ((name, tensor) for name, tensor in state.items() if not name.startswith(SIGHT))
    return model, chain(language, carried_sight(spec, sighted(spec), state, seed, SEED + seed))


@torch.no_grad()
def _filled(model: CausalLM, weights: Weights) -> CausalLM:
    """Return `model` with memory of its own and these weights."""
    replace_parameters(model, lambda name, old: nn.Parameter(torch.empty(old.shape)))
    own = canonical_state(model)
    for name, tensor in weights:
        own[name].copy_(tensor)
    return model


def _random(model: CausalLM) -> Weights:
    """Yield what is drawn for an empty model."""
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names.setdefault(id(tensor), name) != name:
            aliases[name] = names[id(tensor)]
    # Of tied weights the last draw counts.
    earlier = set(aliases.values())
    for prefix, module in drawn_weights(model):
        for leaf, tensor in module.state_dict().items():
            name = f"{prefix}.{leaf}"
            if name not in earlier:
                yield aliases.get(name, name), tensor


def _imported(model: CausalLM, weights: Mapping[str, Tensor]) -> Weights:
    """Yield a checkpoint's weights, and the router parts that it does not have as they begin."""
    rest = {name: tensor for name, tensor in canonical_state(model).items() if name not in weights}
    drawn = any(tensor.is_meta for tensor in rest.values())
    yield from ((name, tensor) for name, tensor in (_random(model) if drawn else rest.items()) if name in rest)
    yield from weights.items()


def _check_shape(spec: ModelSpec, theirs: Model, name: str) -> None:
    """Raise when the checkpoint's weights would mean something else in a model of `spec`, though they might fit."""
    fields = ["hidden_size", "num_layers", "num_heads", "num_kv_heads", "rope_theta", "norm_eps", "tie_embeddings"]
    fields += ["head_width", "attention_bias", "attention_window", "full_every", "attention_sinks", "norm_order"]
    fields += ["rope", "latent", "multipliers"]
    pairs = {field: (getattr(spec, field), getattr(theirs, field)) for field in fields}
    # OLMoE norms queries and keys, Llama and DeepSeek 16B do not.
    if spec.normed != theirs.normed:
        pairs["backbone"] = (spec.backbone, theirs.backbone)
    if spec.upcycle:
        pairs["preset"] = (DENSE, theirs.moe.preset)
        if spec.dense_layers:
            pairs["dense_width"] = (spec.dense_width, dense_width(theirs.moe))
    differing = {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        raise MoegridError(
            f"the checkpoint {name} does not fit the model",
            cause="; ".join(f"model.{field} is {ours!r}, not {its!r}" for field, (ours, its) in differing.items()),
            hint="set these fields to the checkpoint's"
            + (": upcycling starts from a dense one" if spec.upcycle else ""),
        )


def upcycle(dense: CausalLM, spec: ModelSpec, seed: int = SEED) -> CausalLM:
    """Return a model of `spec` whose attention, norms and embeddings are the dense model's.

    `copy`: every expert, shared ones too, starts as the dense feed-forward (narrower experts as its segments in turn).
    `partial`: as `copy`, then half of each routed expert's hidden units are drawn anew. `shared_only`: the shared
    experts alone start as the dense feed-forward. The router and what is drawn anew depend on `seed` alone.
    `spec.upcycling` adds virtual groups, scaled weights and noise. Where `change_at_start` says nothing, logits equal
    the dense model's.
    """
    model = empty_model(spec, dense.vocab_size)
    return _filled(model, _upcycled(model, canonical_state(dense), seed))


def _upcycled(model: CausalLM, dense: Mapping[str, Tensor], seed: int) -> Weights:
    """Return the weights of an empty model that starts from those of a dense one. Raises MoegridError."""
    own = canonical_state(model)
    around = [name for name in dense if ".mlp." not in name]
    for name in around:
        if name not in own or own[name].shape != dense[name].shape:
            raise MoegridError(
                "the dense checkpoint does not fit the model",
                cause=f"{name.removeprefix('backbone.')} has shape {tuple(dense[name].shape)}",
                hint="backbone, hidden_size, layers, heads, vocabulary and tied embeddings must be the checkpoint's",
            )

    def weights() -> Weights:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for prefix, module in drawn_weights(model):
                if not isinstance(module, (MoEBlock, DenseBlock)):
                    continue
                feed_forward = {part: dense[f"{prefix}.ffn.{part}"] for part in ("gate", "up", "down")}
                if isinstance(module, MoEBlock):
                    _fill(module, feed_forward, model.spec, generator)
                    yield from ((f"{prefix}.{leaf}", tensor) for leaf, tensor in module.state_dict().items())
                else:
                    yield from ((f"{prefix}.ffn.{part}", tensor) for part, tensor in feed_forward.items())
        yield from ((name, dense[name]) for name in around)

    return weights()


@torch.no_grad()
def _fill(block: MoEBlock, dense: dict[str, Tensor], spec: Model, generator: torch.Generator) -> None:
    mode, given = spec.upcycle or "copy", spec.upcycling
    if block.moe.expert != "swiglu":
        raise MoegridError("upcycling needs expert 'swiglu', the form of the dense feed-forward")
    width, total = block.moe.expert_width, dense["gate"].shape[0]
    if total % width:
        raise MoegridError(f"expert_width {width} does not divide the dense feed-forward's width {total}")
    parts = total // width
    for name, message in upcycling_problems(block.moe, given, parts):
        raise MoegridError(message, hint=f"change the block's sizes, or model.upcycling.{name}")
    if block.shared is not None:
        rows = torch.arange(block.shared.width) % total
        block.shared.gate.copy_(dense["gate"][rows])
        block.shared.up.copy_(dense["up"][rows])
        block.shared.down.copy_(dense["down"][:, rows])
    if mode == "shared_only":
        return
    for expert in range(block.moe.num_experts):
        first = expert * width % total
        rows = torch.arange(first, first + width)
        block.experts.up[expert, :width] = dense["gate"][rows]
        block.experts.up[expert, width:] = dense["up"][rows]
        block.experts.down[expert] = dense["down"][:, rows]
        if mode == "partial":
            units = torch.randperm(width, generator=generator)[: int(width * given.redrawn)]
            _redraw(block.experts.up[expert, :width], units, generator)
            _redraw(block.experts.up[expert, width:], units, generator)
            _redraw(block.experts.down[expert].t(), units, generator)
    if given.noise:
        for matrices in (block.experts.up, block.experts.down):
            for matrix in matrices:
                matrix += given.noise * matrix.std() * torch.randn(matrix.shape, generator=generator)
    if given.scale_weights:
        block.experts.down.mul_(weight_scale(block.moe, parts))
    if given.groups:
        rows = block.router.weight
        rows.copy_(rows[::parts].repeat_interleave(parts, dim=0))


def said_of_start(spec: Model) -> str:
    """Return how the weights that upcycling begins with differ from the dense model: "the same outputs", or how not."""
    dense = spec_of(open_checkpoint(spec.checkpoint).config).moe
    parts = dense.expert_width // spec.moe.expert_width
    return change_at_start(spec.upcycle, spec.moe, spec.upcycling, parts) or "the same outputs"


def _redraw(matrix: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    """Draw `rows` anew with the mean and the standard deviation that they have."""
    old = matrix[rows]
    noise = torch.randn(old.shape, generator=generator)
    matrix[rows] = (old.mean() + old.std() * noise).to(matrix.dtype)
