"""Models from a resolved specification: with random weights, or with parameters that have yet to get memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedConfig

from jobs.models.backbones import CausalLM
from jobs.models.norm import replace_norms
from jobs.moe.block import DenseBlock, MoEBlock, dense_width
from orchestrator.catalog.backbones import BACKBONES
from orchestrator.errors import MoegridError
from orchestrator.spec.model import Model, ModelSpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.validity import model_problems


def _config(kind: type[PreTrainedConfig], spec: Model, vocab_size: int, **more: int | None) -> PreTrainedConfig:
    """Return transformers' configuration of what is around the feed-forwards."""
    config: PreTrainedConfig = kind(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=1,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.context,
        initializer_range=spec.init_std,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        pad_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        **more,
    )
    return config


def build_model(spec: ModelSpec, vocab_size: int) -> CausalLM:
    """Return a model with random weights from torch's current generator; the caller seeds it.

    Raises MoegridError with every reason when the spec is invalid.
    """
    model = _assembled(spec, vocab_size)
    _reset(model)
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
    return CausalLM(*_backbone(resolve_model(spec), vocab_size))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device when a module takes it; its memory was never touched."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter  # tied weights stay one
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _backbone(spec: Model, vocab_size: int) -> tuple[Model, nn.Module]:
    vocab = spec.vocab_size or vocab_size
    # The feed-forwards that transformers would make are of width 1: they are replaced at once.
    if BACKBONES[spec.backbone].query_key_norm:
        config = _config(OlmoeConfig, spec, vocab, num_experts=1, num_experts_per_tok=1)
        backbone: nn.Module = OlmoeForCausalLM(config)
        config.num_experts, config.num_experts_per_tok = spec.moe.num_experts, spec.moe.top_k
        config.norm_topk_prob, config.intermediate_size = spec.moe.renormalise, spec.moe.expert_width
    else:
        config = _config(LlamaConfig, spec, vocab, bos_token_id=None)
        backbone = LlamaForCausalLM(config)
        config.intermediate_size = spec.dense_width if spec.dense_layers else dense_width(spec.moe)
    replace_norms(backbone)
    return spec, backbone


@torch.no_grad()
def _reset(model: CausalLM) -> None:
    """Draw all weights in module order: N(0, init_std) for matrices, 0 for biases; blocks draw their own."""
    for module in model.modules():
        if isinstance(module, (MoEBlock, DenseBlock)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=model.spec.init_std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
