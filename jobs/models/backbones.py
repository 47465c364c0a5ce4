"""Causal language models: decoder layers around our blocks, with the names that public checkpoints give weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jobs.models.attention import Attention, causal_mask, windowed_mask
from jobs.models.key_values import KeyValues
from jobs.models.latent import LatentAttention
from jobs.models.loss import linear_cross_entropy
from jobs.models.norm import RMSNorm
from jobs.models.packing import Packing
from jobs.models.rotary import Angles, RotaryTables
from jobs.models.vision.sight import Vision
from jobs.moe.block import DenseBlock, MoEBlock, block_of
from jobs.moe.products import linear
from jobs.moe.routing import Routing
from orchestrator.catalog.overflows import NONE
from orchestrator.spec.model import Model
from orchestrator.spec.training import AdapterSpec


@dataclass
class Output:
    """What a forward pass returns. `loss` is the summed cross-entropy over `tokens` labels, when labels were given."""

    logits: Tensor | None
    past_key_values: KeyValues | None
    routings: tuple[Routing, ...]
    loss: Tensor | None = None
    tokens: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What every layer of one forward pass is given beside the hidden states: for the attention, and for the blocks."""

    angles: Angles  # of the positions
    mask: Tensor | Packing | None
    windowed: Tensor | Packing | None  # the mask of layers that see the latest tokens alone
    cache: KeyValues | None
    spans: Tensor | None
    padding: Tensor | None
    keys: Tensor | None  # of random routing
    tokens: Tensor | None  # ids of hashed layers
    recompute: str  # none, block or layer: of it the inputs alone are kept for the backward pass (Chen et al. 2016)

    def of_kept(self, kept: Tensor) -> Given:
        """Return what the last layer is given, whose output is wanted of the `kept` tokens of a packing alone."""
        mask, windowed = (one.of_kept() if isinstance(one, Packing) else None for one in (self.mask, self.windowed))
        return replace(
            self,
            mask=mask,
            windowed=windowed,
            keys=None if self.keys is None else self.keys[kept],
            tokens=None if self.tokens is None else self.tokens[:, kept],
        )


class FeedForward(nn.Module):
    """The place of a decoder layer's feed-forward."""

    def __init__(self, block: MoEBlock | DenseBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BSD: Tensor, given: Given, previous: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the block's output [B,S,D] and, if it routes, its record."""
        if isinstance(self.block, DenseBlock):
            dense: Tensor = self.block(x_BSD)[0]
            return dense, None
        spanned = given.cache is not None and self.block.moe.unit != "token"
        routed: tuple[Tensor, Routing] = self.block(
            x_BSD,
            given.spans,
            given.padding,
            previous=previous,
            keys=given.keys,
            span_states=given.cache.span_states if given.cache is not None and spanned else None,
            tokens=given.tokens,
        )
        return routed


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then that + block(norm(that)): a pre-norm layer as in Llama and OLMoE.

    In a post-norm layer it is what they add that is normed: x + norm(attention(x)) (OLMo 2).
    """

    def __init__(self, spec: Model, layer: int) -> None:
        super().__init__()
        width = spec.dense_width if layer < spec.dense_layers else 0
        self.self_attn = (LatentAttention if spec.latent.kv_rank else Attention)(spec, layer)
        self.windowed, self.post = spec.windowed(layer), spec.norm_order == "post"
        self.multiplier = spec.multipliers.residual
        self.mlp = FeedForward(
            DenseBlock(spec.moe, spec.hidden_size, spec.init_std, width)
            if width
            else block_of(spec.moe, spec.hidden_size, spec.init_std)
        )
        if not self.post:
            self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        if self.post:
            self.post_feedforward_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def forward(self, x_BSD: Tensor, given: Given, previous: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the hidden states [B,S,D] and the block's record; `previous` are the logits carried from below."""
        if given.recompute == "layer":
            again: tuple[Tensor, Routing | None] = checkpoint(self._run, x_BSD, given, previous, use_reentrant=False)
            return again
        return self._run(x_BSD, given, previous)

    def _run(self, x_BSD: Tensor, given: Given, previous: Tensor | None) -> tuple[Tensor, Routing | None]:
        mask = given.windowed if self.windowed else given.mask
        read = x_BSD if self.post else self.input_layernorm(x_BSD)
        added = self.self_attn(read, given.angles, mask, given.cache)
        if isinstance(mask, Packing) and mask.last:
            x_BSD = x_BSD[:, mask.kept]
        x_BSD = x_BSD + self._scaled(self.post_attention_layernorm(added) if self.post else added)
        normed = x_BSD if self.post else self.post_attention_layernorm(x_BSD)
        if given.recompute == "block":
            y, routing = checkpoint(self.mlp, normed, given, previous, use_reentrant=False)
        else:
            y, routing = self.mlp(normed, given, previous)
        return x_BSD + self._scaled(self.post_feedforward_layernorm(y) if self.post else y), routing

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.multiplier == 1.0 else added * self.multiplier


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, spec: Model, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, spec.hidden_size)
        self.embed_tokens.role = "embedding"  # type: ignore[assignment]
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.rotary_emb = RotaryTables(spec.rotary_width, spec.rope_theta, spec.rope)


class Backbone(nn.Module):
    """A decoder and its head, which may be the embedding."""

    def __init__(self, spec: Model, vocab_size: int) -> None:
        super().__init__()
        self.model = Decoder(spec, vocab_size)
        self.lm_head = nn.Linear(spec.hidden_size, vocab_size, bias=False)
        self.lm_head.role = "embedding"  # type: ignore[assignment]
        if spec.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class CausalLM(nn.Module):
    """A causal LM whose feed-forwards are our blocks. Build it with `build_model`."""

    def __init__(self, spec: Model, vocab_size: int) -> None:
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.backbone = Backbone(spec, vocab_size)
        self.vision = None if spec.vision is None else Vision(spec, spec.vision)
        self.adapter: AdapterSpec | None = None
        self.recompute = "none"
        for index, block in enumerate(self.language_blocks):
            block.layer = index
        for block in self.language_blocks[:1]:
            block.router.first_layer()
        for block in self.moe_blocks[: spec.moe.hash_layers]:
            block.router.look_up(vocab_size)

    @property
    def layers(self) -> nn.ModuleList:
        return self.backbone.model.layers

    @property
    def all_layers(self) -> list[nn.Module]:
        """The layers of a vision encoder, and those of the decoder."""
        return [*([] if self.vision is None else self.vision.encoder.layers), *self.layers]

    @property
    def moe_blocks(self) -> list[MoEBlock]:
        """The MoE blocks, those of a vision side first, then in layer order; dense layers are not among them.

        They are aligned with `Output.routings` of a pass that sees pictures through pixels, or of a model without.
        """
        return [*([] if self.vision is None else self.vision.moe_blocks), *self.language_blocks]

    @property
    def language_blocks(self) -> list[MoEBlock]:
        """The MoE blocks of the decoder, in layer order."""
        blocks: list[object] = [decoder.mlp.block for decoder in self.layers]  # type: ignore[union-attr]
        return [block for block in blocks if isinstance(block, MoEBlock)]

    @property
    def causal(self) -> bool:
        """True when no later token can change an earlier token's logits in the current mode (train or eval)."""
        return not self.by_length and all(block.causal for block in self.language_blocks)

    @property
    def by_length(self) -> bool:
        """True when the longest row of a batch decides how the positions of all of them turn."""
        return self.spec.rope.by_length(self.spec.context)

    @property
    def cacheable(self) -> bool:
        """True when a KV cache may be cropped, copied and shared: a token's routing depends on its own state alone."""
        return self.causal and self.spec.moe.unit == "token" and self.spec.moe.overflow == NONE

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        spans: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValues | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        padding: Tensor | None = None,
        packing: Packing | None = None,
        labels: Tensor | None = None,
        shifted: bool = False,
        images: Tensor | None = None,
    ) -> Output:
        """Return logits [B,S,V] (of the last `logits_to_keep` positions or those of an index tensor) and routings.

        `attention_mask` [B,S] is 1 for real tokens (with a cache [B, past + S]); other mask shapes go to the attention
        alone, then `padding` [B,S], True = padding, says which tokens are not routed. `spans` [B,S] are for word and
        sentence routing. With `labels` [B,S] (aligned with `input_ids`, or `shifted`: what follows each of them; -100 =
        none) the summed next-token loss is computed without keeping logits.

        `packing` is what the tokens of one row see of each other, instead of a mask. Of the tokens that it keeps the
        hidden states [n,D] are returned, for `head`, and the last layer's record; where it keeps none in particular,
        everything is as ever.

        `images` [B,H,W,3] (uint8 pixels) or [B,P,D] (features of a frozen encoder) are one picture a row, whose tokens
        stand before its text: positions and cache count them, logits and labels are those of the text. `attention_mask`
        then is [B,S] or None, and `spans` None.
        """
        seen, routed = None, ()
        if images is not None:
            assert self.vision is not None, "a model without a vision side sees no pictures"
            seen, routed = self.vision(images)
            attention_mask, input_ids, labels = _behind(seen, attention_mask, input_ids, labels)
            if padding is not None:
                padding = torch.cat([padding.new_zeros(seen.shape[:2]), padding], 1)
        length = input_ids.shape[1]
        if padding is None and attention_mask is not None and attention_mask.dim() == 2:
            padding = attention_mask[:, -length:] == 0
        cache = KeyValues() if use_cache and past_key_values is None else past_key_values
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)
        decoder = self.backbone.model
        hidden = decoder.embed_tokens(input_ids)
        if self.spec.multipliers.embedding != 1.0:
            hidden = hidden * self.spec.multipliers.embedding
        mask = packing or causal_mask(attention_mask, len(input_ids), length, past, input_ids.device)
        windowed = mask
        if self.spec.attention_window:
            placed = position_ids if cache is None else cache.place(position_ids, len(input_ids))
            windowed = windowed_mask(mask, self.spec.attention_window, position_ids, placed)
        if seen is not None:
            hidden = torch.cat([seen.to(hidden.dtype), hidden[:, seen.shape[1] :]], 1)
        given = Given(
            decoder.rotary_emb(position_ids, hidden.dtype),
            mask,
            windowed,
            cache,
            spans,
            padding,
            self._random_keys(input_ids, position_ids),
            input_ids if self.spec.moe.hash_layers else None,
            self.recompute if self.training and torch.is_grad_enabled() else "none",
        )
        hidden, routings = self._layers(hidden, given)
        routings = (*routed, *routings)
        if seen is not None and labels is None:
            hidden = hidden[:, seen.shape[1] :]
        head: Tensor = self.backbone.lm_head.weight
        if labels is not None:
            hidden, labels = (hidden, labels) if shifted else (hidden[:, :-1], labels[:, 1:])
            loss, tokens = linear_cross_entropy(hidden, head, labels)
            return Output(None, cache, routings, loss, tokens)
        if packing is not None and packing.kept is not None:
            return Output(None, cache, routings, hidden=hidden[0])
        if isinstance(logits_to_keep, Tensor):
            # A [B,S] mask picks positions one by one, in row order: logits are then [n,V].
            hidden = hidden[logits_to_keep] if logits_to_keep.dim() == 2 else hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        return Output(self.head(hidden), cache, routings)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., D] after the last norm."""
        return linear(hidden, self.backbone.lm_head.weight)

    def _layers(self, hidden: Tensor, given: Given) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return the normed hidden states after the last layer, and the records of the layers that route."""
        routings: list[Routing] = []
        previous: Tensor | None = None
        for number, layer in enumerate(self.layers, 1):
            if number == len(self.layers) and (kept := _kept(given.mask)) is not None:
                given, previous = given.of_kept(kept), None if previous is None else previous[kept]
            hidden, routing = layer(hidden, given, previous)
            if routing is not None:
                routings.append(routing)
                previous = routing.carried
        normed: Tensor = self.backbone.model.norm(hidden)
        if self.spec.multipliers.logits != 1.0:
            normed = normed / self.spec.multipliers.logits
        return normed, tuple(routings)

    def _random_keys(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """Return one int64 a token from its position and id: random routing is then independent of batch and cache."""
        if not any(block.router.switches.random_seed is not None for block in self.language_blocks):
            return None
        return (position_ids * 1_000_003 + input_ids).reshape(-1)


def _kept(mask: Tensor | Packing | None) -> Tensor | None:
    """Return the tokens whose output the last layer is asked for, None: all."""
    return mask.kept if isinstance(mask, Packing) else None


def _behind(
    seen_BID: Tensor, attention_mask: Tensor | None, input_ids: Tensor, labels: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return mask, ids and labels with room for a picture's tokens in front, where nothing is a label."""
    batch, extra = seen_BID.shape[:2]
    front = input_ids.new_zeros(batch, extra)
    if attention_mask is not None:
        attention_mask = torch.cat([torch.ones_like(front, dtype=attention_mask.dtype), attention_mask], 1)
    if labels is not None:
        labels = torch.cat([torch.full_like(front, -100), labels], 1)
    return attention_mask, torch.cat([front, input_ids], 1), labels
