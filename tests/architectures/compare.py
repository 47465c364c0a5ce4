"""One row of the table: our block with the weights of transformers', outputs and gradients of both."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from jobs.moe import build_block
from tests.architectures.pairs import D, F, K, N
from tests.architectures.rows import Row

BATCH, LENGTH, VOCAB = 2, 19, 32
COMMON: dict[str, Any] = {"hidden_size": D, "num_experts": N, "top_k": K, "expert_width": F}


def configured(row: Row) -> Any:
    """Return a configuration with the fields that a block reads."""
    scale = row.fields.get("routed_scaling", 1.0)
    common = {
        **dict.fromkeys(("hidden_size", "d_model"), D),
        **dict.fromkeys(("moe_intermediate_size", "intermediate_size", "d_ff", "ffn_hidden_size"), F),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), N),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"), K),
        **dict.fromkeys(("hidden_act", "activation_function"), "silu"),
        **dict.fromkeys(("routed_scaling_factor", "moe_routed_scaling_factor", "route_scale"), scale),
        **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
        **dict.fromkeys(("moe_token_dropout", "activation_dropout", "dropout_rate", "router_jitter_noise"), 0.0),
        **dict.fromkeys(("mlp_bias", "use_bias", "router_bias", "router_ignore_padding_tokens"), False),
        "norm_topk_prob": True,
        "_experts_implementation": "eager",
        "rms_norm_eps": 1e-6,
        "moe_shared_expert_intermediate_size": 2 * F,
        "mlp_hidden_act": "relu2",
        "moe_jitter_eps": None,
        "ffn_act_fn": {"name": "silu"},
        "expert_capacity": None,
        "router_dtype": "float32",
        "dense_act_fn": "relu",
        "vocab_size": VOCAB,
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "batch_prioritized_routing": False,
        "moe_eval_capacity_token_fraction": 0.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "moe_apply_router_weight_on_input": False,
        "prefix_dense_intermediate_size": F,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "kv_sharing_modes": [""],
        **row.config,
    }
    config = SimpleNamespace(**common)
    config.ffn_config = config
    if row.name == "nllb_moe":
        config.activation_function = "relu"
    return config


def random_weights(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3, generator=generator)
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.rand(len(tensor), N, generator=generator).argsort(1)[:, :K])
            if name == "layer_scalar":
                tensor.fill_(1.0)


class NoAttention(nn.Module):
    """In the place of a layer's attention: it adds nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def reference_of(row: Row) -> nn.Module:
    """Return transformers' block with random weights; where it has no class, its layer without attention."""
    module = importlib.import_module(f"transformers.models.{row.name}.modeling_{row.name}")
    made, config = getattr(module, row.block), configured(row)
    more = {"layer": [0], "tokens": [0], "gemma": [0], "width": [F], "nllb": [F], "zaya": [0], "zaya next": [1]}
    attention = [name for name in vars(module) if name.endswith("TextAttention")] if row.run == "gemma" else []
    with contextlib_of(module, attention):
        block: nn.Module = made(config, *more.get(row.run, []))
    random_weights(block)
    return block.train(row.training)


@contextmanager
def contextlib_of(module: Any, names: list[str]) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, NoAttention)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


@contextmanager
def drawn(draws: list[Tensor]) -> Iterator[None]:
    """Give both blocks the same random numbers: of each kind and shape, in the order in which they are asked for."""
    generator = torch.Generator().manual_seed(3)
    tables: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}
    asked: dict[tuple[str, tuple[int, ...]], int] = {}

    def next_of(kind: str, like: Tensor) -> Tensor:
        key = (kind, tuple(like.shape))
        asked[key] = asked.get(key, 0) + 1
        value = torch.rand(like.shape, generator=generator)
        return tables.setdefault((kind, asked[key], key[1]), value)

    def exponential(self: Tensor) -> Tensor:
        return self.copy_(-next_of("exponential", self).log())

    def restart() -> None:
        asked.clear()

    with (
        patch.object(Tensor, "exponential_", exponential),
        patch.object(Tensor, "uniform_", lambda self, *_: self),
        patch.object(torch, "rand_like", lambda like, **_: next_of("rand", like)),
    ):
        draws.append(restart)  # type: ignore[arg-type]
        yield


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return max|ours - theirs| / max(1, max|theirs|)."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))


def gradients_as_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters are the gradients of the original's."""
    shadow = copy.deepcopy(module)
    with torch.no_grad():
        for own, original in zip(shadow.parameters(), module.parameters(), strict=True):
            own.copy_(torch.zeros_like(original) if original.grad is None else original.grad)
    return shadow


def routed_as_meant(block: Any, x: Tensor) -> Tensor:
    """NLLB's own router and experts, each expert at the tokens that have chosen it."""
    flat = x.view(-1, D)
    _, weights, _ = block.router(flat)
    return sum(
        (weights[:, index : index + 1] * block.experts[f"expert_{index}"](flat) for index in range(N)), torch.zeros(())
    ).view(x.shape)


def call(row: Row, reference: Any, x: Tensor, more: dict[str, Tensor]) -> Tensor:
    """Return the reference's output for hidden states x [B,S,D]."""
    if row.run == "gemma":
        return reference(x) - x
    if row.run == "nllb":
        return routed_as_meant(reference, x)
    if row.run == "tokens":
        return reference(x, more["tokens"])
    if row.run == "zaya next":
        return reference(x, more["previous"].view(BATCH, LENGTH, -1))[0]
    # Some blocks write on what they are given.
    out = reference(x.clone())
    out = out[0] if isinstance(out, tuple) else out
    return out.view(x.shape)


def compared(row: Row) -> dict[str, float]:
    """Return the relative differences of output, input gradient and each weight's gradient."""
    reference = reference_of(row)
    block: Any = build_block({**COMMON, **row.fields}, vocab_size=VOCAB).train(row.training)
    if row.run == "zaya":
        block.router.first_layer()
    its = row.pairs(reference, 1.0)
    assert block.named_weights().keys() == its.keys(), (sorted(block.named_weights()), sorted(its))
    block.load_named({name: tensor.detach() for name, tensor in its.items()})
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(BATCH, LENGTH, D, generator=generator) for _ in range(2))
    more: dict[str, Tensor] = {}
    if row.run == "tokens":
        more["tokens"] = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    if row.run == "zaya next":
        more["previous"] = torch.randn(BATCH * LENGTH, row.config["router_hidden_size"], generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = both(row, lambda: block(ours, **more)[0], lambda: call(row, reference, theirs, more))
    (y * target).sum().backward()
    (expected * target).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    found = {"output": difference(y, expected), "input": difference(ours.grad, theirs.grad)}
    trained = {name for name, _ in block.named_parameters()} | {"experts.gate", "experts.gate_bias"}
    own = gradients_as_weights(block).named_weights()
    for name, gradient in row.pairs(gradients_as_weights(reference), 0.0).items():
        if name in trained:
            found[name] = difference(own[name], gradient)
    return found


def both(row: Row, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what both compute, with the same random numbers where they draw some."""
    if row.run == "drawn":
        draws: list[Any] = []
        with drawn(draws):
            y = ours()
            draws[0]()
            return y, theirs()
    torch.manual_seed(7)
    y = ours()
    torch.manual_seed(7)
    return y, theirs()
