"""Causal language models: decoder layers, masks and cache of transformers; feed-forwards, attention and norms ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from jobs.models.attention import Attention
from jobs.models.loss import linear_cross_entropy
from jobs.moe.block import DenseBlock, MoEBlock, block_of
from jobs.moe.routing import Routing
from jobs.moe.spans import SpanState
from orchestrator.spec.model import Model
from orchestrator.spec.training import AdapterSpec


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
        self.adapter: AdapterSpec | None = None
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
