"""Vision encoders: the architectures whose patch features a language model can be given, and their public layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry

Colours = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class EncoderKind:
    """A vision transformer by name: pre-norm layers over patches, of which the last norm's output is taken.

    `class_token` stands before the patches and is left out of the features; `layer_scale` multiplies what a layer adds.
    `expert` is the form of its feed-forwards (`orchestrator.catalog.experts`), `layout` the dotted path of a mapping
    from our names of weights to those of the public checkpoints, `model_types` the `model_type`s of these in a
    config.json. A pixel value v of 0 to 1 becomes (v - mean) / std, colour by colour.
    """

    name: str
    expert: str
    layout: str
    model_types: tuple[str, ...]
    class_token: bool
    layer_scale: bool
    mean: Colours
    std: Colours
    description: str = ""
    version: int = 1


BUILTINS: Mapping[str, EncoderKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            EncoderKind(
                "dinov2",
                expert="gelu_mlp_bias",
                layout="jobs.models.vision.layouts:dinov2",
                model_types=("dinov2",),
                class_token=True,
                layer_scale=True,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                description="DINOv2 (Oquab et al. 2023): a class token, layer scale, exact GELU",
            ),
            EncoderKind(
                "siglip",
                expert="gelu_tanh_mlp_bias",
                layout="jobs.models.vision.layouts:siglip",
                model_types=("siglip", "siglip_vision_model"),
                class_token=False,
                layer_scale=False,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                description="SigLIP's vision tower (Zhai et al. 2023) without its pooling head: GELU by tanh",
            ),
        )
    }
)
ENCODERS = Registry("encoders", "encoder", EncoderKind, BUILTINS)
