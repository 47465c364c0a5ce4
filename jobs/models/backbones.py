"""Causal language models: decoder layers, masks and cache of transformers; feed-forwards, attention and norms ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedConfig

from jobs.models.attention import Attention
from jobs.models.loss import linear_cross_entropy
from jobs.models.norm import replace_norms
from jobs.models.shards import tensors_digest
from jobs.moe.block import DenseBlock, MoEBlock, block_of, dense_width
from jobs.moe.routing import Routing
from jobs.moe.spans import SpanState
from orchestrator.errors import MoegridError
from orchestrator.spec.model import Model, ModelSpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.validity import model_problems


@dataclass
class Output:
    """What a forward pass returns. `loss` is the summed cross-entropy over `tokens` labels, when labels were given."""

    logits: Tensor | None
    past_key_values: Any
    routings: tuple[Routing, ...]
    loss: Tensor | None = None
    tokens: Tensor | None = None


@dataclass
class _Call:
    """What the blocks of one forward pass share, and the records they leave."""

    spans: Tensor | None
    padding: Tensor | None
    keys: Tensor | None
    span_states: dict[int, SpanState] | None
    routings: list[Routing]
    previous: Tensor | None = None


class _FeedForward(nn.Module):
    """The place of a decoder layer's feed-forward: hands the call's spans, padding and residual logits to the block."""

    def __init__(self, block: MoEBlock | DenseBlock) -> None:
        super().__init__()
        self.block = block
        self.call: list[_Call | None] = [None]

    def forward(self, x_BSD: Tensor) -> Tensor:
        call = self.call[0]
        if call is None or isinstance(self.block, DenseBlock):
            dense: Tensor = self.block(x_BSD)[0]
            return dense
        result: tuple[Tensor, Routing] = self.block(
            x_BSD,
            call.spans,
            call.padding,
            previous=call.previous,
            keys=call.keys,
            span_states=call.span_states,
        )
        y, routing = result
        call.routings.append(routing)
        call.previous = routing.carried
        return y


class CausalLM(nn.Module):
    """A transformers causal LM whose feed-forwards are our blocks. Build it with `build_model`."""

    def __init__(self, spec: Model, backbone: Any) -> None:
        super().__init__()
        self.spec = spec
        self.backbone: Any = backbone
        self._call: list[_Call | None] = [None]
        decoders: list[Any] = list(self.layers)
        for layer, decoder in enumerate(decoders):
            width = spec.dense_width if layer < spec.dense_layers else 0
            block = (
                DenseBlock(spec.moe, spec.hidden_size, spec.init_std, width)
                if width
                else block_of(spec.moe, spec.hidden_size, spec.init_std)
            )
            decoder.mlp = _FeedForward(block)
            decoder.mlp.call = self._call
            decoder.self_attn = Attention(decoder.self_attn)
            decoder.self_attn.role = "attention"
        for index, block in enumerate(self.moe_blocks):
            block.layer = index
        for block in self.moe_blocks[:1]:
            block.router.first_layer()
        backbone.model.embed_tokens.role = "embedding"
        backbone.lm_head.role = "embedding"

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.backbone.model.layers
        return layers

    @property
    def moe_blocks(self) -> list[MoEBlock]:
        """The MoE blocks in layer order, aligned with `Output.routings`; dense layers are not among them."""
        blocks: list[object] = [decoder.mlp.block for decoder in self.layers]  # type: ignore[union-attr]
        return [block for block in blocks if isinstance(block, MoEBlock)]

    @property
    def causal(self) -> bool:
        """True when no later token can change an earlier token's logits in the current mode (train or eval)."""
        return all(block.causal for block in self.moe_blocks)

    @property
    def cacheable(self) -> bool:
        """True when a KV cache may be cropped, copied and shared: a token's routing depends on its own state alone."""
        return self.causal and self.spec.moe.unit == "token"

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        spans: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        padding: Tensor | None = None,
        labels: Tensor | None = None,
        shifted: bool = False,
    ) -> Output:
        """Return logits [B,S,V] (of the last `logits_to_keep` positions or those of an index tensor) and routings.

        `attention_mask` [B,S] is 1 for real tokens (with a cache [B, past + S]); other mask shapes go to the attention
        alone, then `padding` [B,S], True = padding, says which tokens are not routed. `spans` [B,S] are for word and
        sentence routing. With `labels` [B,S] (aligned with `input_ids`, or `shifted`: what follows each of them; -100 =
        none) the summed next-token loss is computed without keeping logits.
        """
        length = input_ids.shape[1]
        if padding is None and attention_mask is not None and attention_mask.dim() == 2:
            padding = attention_mask[:, -length:] == 0
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        states = None
        if past_key_values is not None and self.spec.moe.unit != "token":
            states = past_key_values.__dict__.setdefault("span_states", {})
        call = _Call(spans, padding, self._random_keys(input_ids, position_ids, past_key_values), states, [])
        self._call[0] = call
        try:
            hidden = self.backbone.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
            ).last_hidden_state
        finally:
            self._call[0] = None
        routings = tuple(call.routings)
        head: Tensor = self.backbone.lm_head.weight
        if labels is not None:
            hidden, labels = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
            loss, tokens = linear_cross_entropy(hidden, head, labels)
            return Output(None, past_key_values, routings, loss, tokens)
        if isinstance(logits_to_keep, Tensor):
            # A [B,S] mask picks positions one by one, in row order: logits are then [n,V].
            hidden = hidden[logits_to_keep] if logits_to_keep.dim() == 2 else hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        return Output(torch.nn.functional.linear(hidden, head), past_key_values, routings)

    def _random_keys(self, input_ids: Tensor, position_ids: Tensor | None, cache: Any) -> Tensor | None:
        """Return one int64 a token from its position and id: random routing is then independent of batch and cache."""
        if not any(block.router.switches.random_seed is not None for block in self.moe_blocks):
            return None
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return (position_ids * 1_000_003 + input_ids).reshape(-1)


def _olmoe_config(spec: Model, vocab_size: int) -> PreTrainedConfig:
    return OlmoeConfig(
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
        num_experts=1,
        num_experts_per_tok=1,
        pad_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def _llama_config(spec: Model, vocab_size: int) -> PreTrainedConfig:
    return LlamaConfig(
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
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def build_model(spec: ModelSpec, vocab_size: int) -> CausalLM:
    """Return a model with random weights from torch's current generator; the caller seeds it.

    Raises MoegridError with every reason when the spec is invalid.
    """
    problems = model_problems(spec)
    if problems:
        raise MoegridError("this model cannot be built", cause="; ".join(fault.message for fault in problems))
    model = CausalLM(*_backbone(resolve_model(spec), vocab_size))
    _reset(model)
    return model


def _backbone(spec: Model, vocab_size: int) -> tuple[Model, nn.Module]:
    vocab = spec.vocab_size or vocab_size
    # The feed-forwards that transformers would make are of width 1: they are replaced at once.
    if spec.backbone == "olmoe":
        config = _olmoe_config(spec, vocab)
        backbone: nn.Module = OlmoeForCausalLM(config)
        config.num_experts, config.num_experts_per_tok = spec.moe.num_experts, spec.moe.top_k
        config.norm_topk_prob, config.intermediate_size = spec.moe.renormalise, spec.moe.expert_width
    else:
        config = _llama_config(spec, vocab)
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


def parameter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (name, parameter, role): the role of the nearest enclosing module that has one, else `other`."""
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str, role: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        role = getattr(module, "role", role)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter, role
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.", role)

    yield from walk(model, "", "other")


def canonical_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name in a fixed order, tied weights once: a state's weights."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def load_canonical(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `canonical_state` back in; raises MoegridError when names differ.

    C2R's lists may be missing: those of a state from before fine-tuning limit nothing.
    """
    own = canonical_state(model)
    unlimited = {name for name in own if name.endswith(".router.allowed") and name not in state}
    if own.keys() - unlimited != set(state):
        difference = sorted(own.keys() ^ set(state))
        raise MoegridError(
            "these weights belong to another model", cause=f"differing names: {', '.join(difference[:8])}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.fill_(True) if name in unlimited else tensor.copy_(state[name])


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of names, dtypes, shapes and bytes of `canonical_state`."""
    return tensors_digest(canonical_state(model))
