"""Models from a resolved specification: with random weights, or with parameters that have yet to get memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from jobs.models.attention import Sinks
from jobs.models.backbones import CausalLM, DecoderLayer
from jobs.models.norm import RMSNorm
from jobs.moe.block import DenseBlock, MoEBlock
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.validity import model_problems

T = TypeVar("T")
_DRAWS = frozenset({nn.init.normal_, nn.init.orthogonal_, nn.init.kaiming_uniform_, nn.init.uniform_})


def build_model(spec: ModelSpec, vocab_size: int) -> CausalLM:
    """Return a model with random weights from torch's current generator; the caller seeds it.

    Raises MoegridError with every reason when the spec is invalid.
    """
    model = _assembled(spec, vocab_size)
    with torch.no_grad():
        _pass_over(model)
        for module in model.modules():
            _draw(module, model.spec.init_std)
        if model.vision is not None:
            model.vision.reset_parameters()
    return model


def empty_model(spec: ModelSpec, vocab_size: int) -> CausalLM:
    """Return a model whose parameters are on the meta device; its buffers have their values, in host memory.

    `jobs.models.weights.materialise` gives the parameters memory and values. Raises MoegridError as `build_model` does.
    """
    with _parameters_on_meta():
        return _assembled(spec, vocab_size)


def _assembled(spec: ModelSpec, vocab_size: int) -> CausalLM:
    problems = model_problems(spec)
    if problems:
        raise MoegridError("this model cannot be built", cause="; ".join(fault.message for fault in problems))
    return CausalLM(resolve_model(spec), spec.vocab_size or vocab_size)


class _NoDraws(TorchFunctionMode):
    """Leave alone what has no memory to draw into: torch's meta kernels of draws import its compiler, for 2 s."""

    def __torch_function__(
        self, func: Callable[..., T], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> T:
        if func in _DRAWS:
            drawn: T = args[0] if args else (kwargs or {})["tensor"]
            return drawn
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device when a module takes it; its memory was never touched."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter  # tied weights stay one
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    try:
        with _NoDraws():
            yield
    finally:
        handle.remove()


def drawn_weights(model: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    """Draw an empty model's weights as `build_model` would of one that reads, and yield (name, module) of what has any.

    The module has memory and values until the next one is asked for: no more than one is held. A tied head is drawn
    last, and then holds what the embedding is.
    """
    spec, width = model.spec, model.spec.hidden_size
    # What `build_model` draws while it makes its modules, in the same order and one at a time.
    nn.Embedding(model.vocab_size, width)
    for layer in range(spec.num_layers):
        DecoderLayer(spec, layer)
    nn.Linear(width, model.vocab_size, bias=False)
    with torch.no_grad():
        _pass_over(model)
    for name, module in model.named_modules():
        if not isinstance(module, (MoEBlock, DenseBlock, nn.Linear, nn.Embedding, RMSNorm, Sinks)):
            continue
        places = [(owner, leaf, old) for owner in module.modules() for leaf, old in owner._parameters.items()]
        for owner, leaf, old in places:
            if old is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty(old.shape), old.requires_grad)
        with torch.no_grad():
            _draw(module, model.spec.init_std)
        yield name, module
        for owner, leaf, old in places:
            owner._parameters[leaf] = old


def _pass_over(model: CausalLM) -> None:
    """Move torch's generator to where the weights of a seed begin: behind two draws of what is around the blocks.

    The first is torch's own, when the modules are made. The second is that of an initialiser which drew all matrices
    again, with a feed-forward of one hidden unit in each layer; seeds keep their weights.
    """
    width, gated = model.spec.hidden_size, not BACKBONES[model.spec.backbone].query_key_norm
    for embedding in (model.backbone.model.embed_tokens, model.backbone.lm_head):
        torch.empty(embedding.weight.shape).normal_()
    for layer in model.layers:
        for matrix in layer.self_attn.modules():  # type: ignore[union-attr]
            if isinstance(matrix, nn.Linear):
                torch.empty(matrix.weight.shape).normal_()
        for rows in (1, 1, 1) if gated else (1, 2, 1):
            torch.empty(rows, width).normal_()
            if gated:
                torch.empty(rows, width).uniform_()


def _draw(module: nn.Module, std: float) -> None:
    """Draw a module's weights: N(0, std) for matrices, 0 for biases, 1 for norms; blocks draw their own."""
    if isinstance(module, (MoEBlock, DenseBlock)):
        module.reset_parameters()
    elif isinstance(module, (nn.Linear, nn.Embedding, Sinks)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, RMSNorm):
        nn.init.ones_(module.weight)
