"""A vision transformer: from pixels to one feature vector a patch, with feed-forwards that may be our MoE blocks.

Shapes: B pictures, P patches, T tokens (P, and one more where there is a class token), D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.models.vision.checkpoints import encoder_weights
from jobs.moe.block import DenseBlock, MoEBlock, block_of
from jobs.moe.routing import Routing
from orchestrator.catalog.encoders import ENCODERS, EncoderKind
from orchestrator.spec.model import Moe
from orchestrator.spec.resolve import dense_block
from orchestrator.spec.vision import EncoderSpec


class SelfAttention(nn.Module):
    """Attention of every token to every token, with biases."""

    role = "attention"

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(spec.hidden_size, spec.hidden_size) for _ in range(4)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the attention's output [B,T,D]."""
        batch, length, width = x_BTD.shape
        query, key, value = (
            projection(x_BTD).view(batch, length, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return attended


class EncoderLayer(nn.Module):
    """x + s1 * attention(norm(x)), then that + s2 * block(norm(that)); the scales are 1 where the kind has none."""

    def __init__(self, spec: EncoderSpec, kind: EncoderKind, moe: Moe) -> None:
        super().__init__()
        self.attention = SelfAttention(spec)
        self.block: MoEBlock | DenseBlock = block_of(moe, spec.hidden_size, spec.init_std)
        self.attention_norm = nn.LayerNorm(spec.hidden_size, spec.norm_eps)
        self.block_norm = nn.LayerNorm(spec.hidden_size, spec.norm_eps)
        scaled = kind.layer_scale
        self.attention_scale = nn.Parameter(torch.ones(spec.hidden_size)) if scaled else None
        self.block_scale = nn.Parameter(torch.ones(spec.hidden_size)) if scaled else None

    def forward(self, x_BTD: Tensor, previous: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the hidden states [B,T,D] and the block's record; `previous` are the logits carried from below."""
        x_BTD = x_BTD + _scaled(self.attention_scale, self.attention(self.attention_norm(x_BTD)))
        normed = self.block_norm(x_BTD)
        y, routing = self.block(normed, previous=previous) if isinstance(self.block, MoEBlock) else self.block(normed)
        return x_BTD + _scaled(self.block_scale, y), routing


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale * x


class Encoder(nn.Module):
    """A vision encoder: patches of the picture, learned positions, layers, and a last norm.

    `moe` is the block of every layer, dense or of experts.
    """

    class_token: nn.Parameter | None

    def __init__(self, spec: EncoderSpec, moe: Moe) -> None:
        super().__init__()
        kind = ENCODERS.get(spec.encoder)
        self.spec, self.kind = spec, kind
        tokens = spec.positions**2 + kind.class_token
        self.patches = nn.Conv2d(3, spec.hidden_size, spec.patch_size, stride=spec.patch_size)
        self.positions = nn.Parameter(torch.empty(tokens, spec.hidden_size))
        self.register_parameter(
            "class_token", nn.Parameter(torch.empty(spec.hidden_size)) if kind.class_token else None
        )
        self.layers = nn.ModuleList(EncoderLayer(spec, kind, moe) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.hidden_size, spec.norm_eps)
        for index, block in enumerate(self.moe_blocks):
            block.layer = index
        for block in self.moe_blocks[:1]:
            block.router.first_layer()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw matrices from N(0, init_std) with torch's current generator; biases 0, norms and scales 1."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=self.spec.init_std)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, (MoEBlock, DenseBlock, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, EncoderLayer):
                for scale in (module.attention_scale, module.block_scale):
                    if scale is not None:
                        nn.init.ones_(scale)
        nn.init.normal_(self.positions, std=self.spec.init_std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=self.spec.init_std)

    @property
    def moe_blocks(self) -> list[MoEBlock]:
        """The MoE blocks in layer order, none of a dense encoder."""
        blocks: list[object] = [layer.block for layer in self.layers]
        return [block for block in blocks if isinstance(block, MoEBlock)]

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (patch features [B,P,D], the records of the layers that route) of uint8 pixels [B,H,W,3]."""
        x = self.patches(self.normalised(images)).flatten(2).transpose(1, 2)
        grid = images.shape[1] // self.spec.patch_size, images.shape[2] // self.spec.patch_size
        x = x + self._positions(grid)
        if self.class_token is not None:
            first = (self.class_token + self.positions[0]).expand(len(x), 1, -1)
            x = torch.cat([first, x], 1)
        routings: list[Routing] = []
        previous: Tensor | None = None
        for layer in self.layers:
            x, routing = layer(x, previous)
            if routing is not None:
                routings.append(routing)
                previous = routing.carried
        x = self.norm(x)
        return (x if self.class_token is None else x[:, 1:]), tuple(routings)

    def normalised(self, images: Tensor) -> Tensor:
        """Return uint8 pixels [B,H,W,3] as the encoder was trained to see them, [B,3,H,W]."""
        dtype = self.positions.dtype
        mean, std = (torch.tensor(values, device=images.device) for values in (self.kind.mean, self.kind.std))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the patches' positions [P,D], interpolated (bicubic) where the picture has another grid."""
        side = self.spec.positions
        table = self.positions[1:] if self.class_token is not None else self.positions
        if grid == (side, side):
            return table
        rows, columns = (_interpolation(side, size, table.device) for size in grid)
        with torch.autocast(table.device.type, enabled=False):
            resized = torch.einsum("hi,wj,ijd->hwd", rows, columns, table.float().view(side, side, -1))
        return resized.flatten(0, 1).to(table.dtype)


@torch.no_grad()
def _interpolation(side: int, size: int, device: torch.device) -> Tensor:
    """Return the matrix [size, side] of bicubic interpolation.

    Of `F.interpolate` itself a GPU has no deterministic gradient, and torch refuses the other.
    """
    each = torch.eye(side, device=device).view(1, side, side, 1)
    return F.interpolate(each, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t()


def first_encoder(spec: EncoderSpec, seed: int) -> Encoder:
    """Return `build_encoder`'s encoder before any training; random weights are drawn by `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_encoder(spec)


def build_encoder(spec: EncoderSpec) -> Encoder:
    """Return a dense encoder: with the weights of `spec.checkpoint`, else random ones from torch's current generator.

    Raises SourceError and MoegridError as `encoder_weights` does.
    """
    encoder = Encoder(spec, dense_block(ENCODERS.get(spec.encoder).expert, spec.width))
    encoder.reset_parameters()
    if spec.checkpoint:
        encoder.load_state_dict(dict(encoder_weights(spec)))
    return encoder
