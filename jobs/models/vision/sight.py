"""What a language model sees with: a vision encoder, and a connector from its features to tokens of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from jobs.models.vision.encoder import Encoder, first_encoder
from jobs.moe.block import DenseBlock, MoEBlock, block_of
from jobs.moe.routing import Routing
from orchestrator.spec.model import Model
from orchestrator.spec.resolve import before_upcycling, connector_block, encoder_block
from orchestrator.spec.vision import VisionSpec

# By which its weights' names in a state begin.
PREFIX = "vision."


class Connector(nn.Module):
    """Pooled patch features [B,I,D] -> tokens of the language model [B,I,L], by a feed-forward or by experts.

    A token is the mean of a square of patches; what does not fill a square at the right and the bottom is left out.
    """

    def __init__(self, spec: Model, vision: VisionSpec) -> None:
        super().__init__()
        self.pooling, self.side = vision.pooling, vision.side
        self.block: MoEBlock | DenseBlock = block_of(
            connector_block(spec), vision.hidden_size, vision.init_std, spec.hidden_size
        )

    def forward(self, features_BPD: Tensor) -> tuple[Tensor, Routing | None]:
        """Return (tokens [B,I,L], the block's record)."""
        batch, _, width = features_BPD.shape
        square = features_BPD.view(batch, self.side, self.side, width).permute(0, 3, 1, 2)
        pooled = nn.functional.avg_pool2d(square, self.pooling).flatten(2).transpose(1, 2)
        found: tuple[Tensor, Routing | None] = self.block(pooled.contiguous())
        return found


class Vision(nn.Module):
    """From pixels, or from the features that a frozen encoder made of them, to tokens of the language model."""

    def __init__(self, spec: Model, vision: VisionSpec) -> None:
        super().__init__()
        self.encoder = Encoder(vision, encoder_block(spec))
        self.connector = Connector(spec, vision)
        for index, block in enumerate(self.moe_blocks):
            block.layer = index
        if isinstance(self.connector.block, MoEBlock):
            self.connector.block.router.first_layer()

    @property
    def moe_blocks(self) -> list[MoEBlock]:
        """The MoE blocks of the encoder, layer by layer, and of the connector."""
        own = [self.connector.block] if isinstance(self.connector.block, MoEBlock) else []
        return [*self.encoder.moe_blocks, *own]

    def reset_parameters(self) -> None:
        """Draw all weights from torch's current generator."""
        self.encoder.reset_parameters()
        self.connector.block.reset_parameters()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (tokens [B,I,L], the records) of uint8 pixels [B,H,W,3] or of features [B,P,D]."""
        routings: tuple[Routing, ...] = ()
        features = images
        if images.dtype == torch.uint8:
            features, routings = self.encoder(images)
        tokens, routing = self.connector(features.to(self.encoder.positions.dtype))
        return tokens, routings if routing is None else (*routings, routing)


def first_sight(spec: Model, vision: VisionSpec, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a dense vision side by their names in a state: the encoder's of its checkpoint, else drawn.

    What is drawn depends on `seed` alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        connector = Connector(spec, vision)
    for part, module in (("encoder", first_encoder(vision, seed)), ("connector", connector)):
        yield from ((f"{PREFIX}{part}.{name}", tensor) for name, tensor in module.state_dict().items())


def upcycled_sight(
    spec: Model, vision: VisionSpec, dense: Mapping[str, Tensor], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a vision side whose blocks start as copies of the dense ones in the state `dense`.

    Every routed expert is a copy of the whole feed-forward, biases too, and so is each shared one; routers and what
    they bring are drawn by `seed` alone. Where a token's weights sum to 1 and nothing is shared or special, the output
    is that of the dense side.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sight = Vision(spec, vision)
        sight.reset_parameters()
    blocks = {name: module for name, module in sight.named_modules() if isinstance(module, MoEBlock)}
    for name, block in blocks.items():
        _copy(block, {part: dense[f"{PREFIX}{name}.ffn.{part}"] for part in ("up", "up_bias", "down", "down_bias")})
    for name, tensor in sight.state_dict().items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        yield PREFIX + name, tensor if inside else dense[PREFIX + name]


@torch.no_grad()
def _copy(block: MoEBlock, dense: Mapping[str, Tensor]) -> None:
    for part, tensor in dense.items():
        experts: Tensor = getattr(block.experts, part)
        experts.copy_(tensor.expand_as(experts))
        if block.shared is None:
            continue
        shared: Tensor = getattr(block.shared, part)
        copies = block.moe.shared_experts
        if part == "down":  # the copies stand side by side in the hidden units
            shared.copy_(tensor.repeat(1, copies))
        elif part == "down_bias":
            shared.copy_(copies * tensor)
        else:
            shared.copy_(torch.cat([tensor] * copies))


def carried_sight(
    spec: Model, vision: VisionSpec, state: Mapping[str, Tensor], seed: int, router_seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the vision side of a model that begins in a state: what it has, upcycled where it is asked.

    A state of a model without pictures, or none, gets a vision side of its own, by `seed`.
    """
    dense = state
    if not any(name.startswith(PREFIX) for name in state):
        dense = dict(first_sight(before_upcycling(spec), vision, seed))
    yield from upcycled_sight(spec, vision, dense, router_seed)
